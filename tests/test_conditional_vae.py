"""Conditional and semi-supervised VAE: enumeration against explicit sums, conditions, labels, refusals."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor

from probgen.core import Batch, InputError
from probgen.models.conditional_vae import ConditionalVAE, SemiSupervisedVAE
from probgen.models.vae import point_posterior

NUM_CLASSES = 3


def loss_of(program: Any, batch: Batch, elbo: Any) -> Tensor:
    """Negative ELBO of all rows."""
    return elbo.differentiable_loss(pyro.condition(program.model, data=batch.data), program.guide, batch)


def small(label_weight: float = 0.0) -> SemiSupervisedVAE:
    """A deterministic bound: every z is the encoder's loc."""
    program = SemiSupervisedVAE.mlp((4,), 2, NUM_CLASSES, widths=(8,), label_weight=label_weight)
    program.posterior = point_posterior
    return program


# --- p(x | c) -----------------------------------------------------------------------------------------------------


def test_labels_and_their_one_hot_rows_are_the_same_condition() -> None:
    program, x, labels = ConditionalVAE.mlp((4,), 2, 3, widths=(8,)), torch.randn(6, 4), torch.arange(6) % 3
    program.posterior = point_posterior
    losses = [
        loss_of(program, Batch({"x": x}, condition=condition), TraceMeanField_ELBO())
        for condition in (labels, torch.eye(3)[labels], torch.eye(3)[(labels + 1) % 3])
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_conditional_particles_come_in_on_the_left() -> None:
    program = ConditionalVAE.mlp((2, 2), 2, 3, widths=(8,))
    batch = Batch({"x": torch.randn(5, 2, 2)}, condition=torch.randn(5, 3))
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss_of(program, batch, elbo).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in program.parameters())
    with pyro.plate("particles", 4, dim=-2):
        assert program.model(batch).shape == (4, 5, 2, 2)


def test_conditional_vae_learns_what_depends_on_the_condition() -> None:
    """x = +-2 by class, sd 0.3: the bound reaches log N within 0.1 nats; with shuffled conditions it stays 0.5 away."""
    labels = torch.randint(2, (500,))
    x = (4.0 * labels - 2)[:, None] + 0.3 * torch.randn(500, 1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.3**2)

    def fitted(condition: Tensor) -> float:
        torch.manual_seed(0)
        program = ConditionalVAE.mlp((1,), 1, 2, widths=(16,))
        optim = torch.optim.Adam(program.parameters(), lr=0.02)
        for _ in range(300):
            optim.zero_grad()
            loss = loss_of(program, Batch({"x": x}, condition=condition), TraceMeanField_ELBO()) / 500
            loss.backward()
            optim.step()
        return float(loss.detach())

    assert fitted(labels) == pytest.approx(entropy, abs=0.1)
    assert fitted(labels[torch.randperm(500)]) > entropy + 0.5


@pytest.mark.parametrize(
    ("condition", "complaint"),
    [
        (None, "needs a condition"),
        (torch.tensor([0, 3]), "expected int64 labels .* got 3 among 1 wrong"),
        (torch.tensor([0, -1]), "Missing labels"),
        (torch.tensor([0, 1], dtype=torch.int32), "int32"),
        (torch.zeros(2, 4), "condition: expected"),
    ],
)
def test_refuses_conditions(condition: Tensor | None, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ConditionalVAE.mlp((4,), 2, 3).model(Batch({"x": torch.zeros(2, 4)}, condition=condition))


# --- c as a site --------------------------------------------------------------------------------------------------


def test_enumeration_is_the_sum_over_classes() -> None:
    """-loss = sum_c q(c | x) (ELBO(x, c) - log q(c | x)); leaving out the entropy of q(c | x) does not match."""
    program, x = small(), torch.randn(5, 4)
    loss = loss_of(program, Batch({"x": x}), TraceEnum_ELBO(max_plate_nesting=1))
    probs = program.classify(x)
    by_class = torch.stack([labelled_elbo(program, x, c) for c in range(NUM_CLASSES)], dim=1)
    torch.testing.assert_close(-loss, (probs * (by_class - probs.log())).sum())
    assert not torch.allclose(-loss, (probs * by_class).sum())


def labelled_elbo(program: SemiSupervisedVAE, x: Tensor, label: int) -> Tensor:
    """The ELBO of (x, c) row by row, from Pyro's sum over one row."""
    rows = [Batch({"x": row[None], "c": torch.tensor([label])}) for row in x]
    return torch.stack([-loss_of(program, row, Trace_ELBO()) for row in rows])


def test_labelled_elbo_written_out() -> None:
    program, x, c = small(), torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    one_hot = torch.eye(NUM_CLASSES)[c]
    z = program.law_of_z(x, one_hot).mean
    log_joint = program.law_of_x(z, one_hot).log_prob(x) + program.prior().log_prob(z) - math.log(NUM_CLASSES)
    torch.testing.assert_close(-loss_of(program, Batch({"x": x, "c": c}), Trace_ELBO()), log_joint.sum())


def test_enumeration_under_vectorised_particles() -> None:
    program, batch = (
        SemiSupervisedVAE.mlp((2, 2), 2, NUM_CLASSES, widths=(8,)),
        Batch({"x": torch.randn(5, 2, 2)}),
    )
    elbo = TraceEnum_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    loss_of(program, batch, elbo).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in program.parameters())
    program.posterior = point_posterior
    one = loss_of(program, batch, TraceEnum_ELBO(max_plate_nesting=1))
    torch.testing.assert_close(loss_of(program, batch, elbo), one)


def test_simulation_and_classification_shapes() -> None:
    program = small()
    assert program.model(Batch(num_rows=7)).shape == (7, 4)
    probs = program.classify(torch.randn(2, 7, 4))
    assert probs.shape == (2, 7, NUM_CLASSES)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 7))


def test_label_weight_counts_in_training_and_leaves_the_bound_alone_in_evaluation() -> None:
    program, x, c = small(label_weight=7.0), torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    batch = Batch({"x": x, "c": c}, total=10)
    taught = loss_of(program.train(), batch, Trace_ELBO())
    bound = loss_of(program.eval(), batch, Trace_ELBO())
    log_q = program.classify(x).log()[torch.arange(5), c]
    torch.testing.assert_close(taught, bound - 2 * 7.0 * log_q.sum())
    unlabelled = Batch({"x": x})
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    torch.testing.assert_close(
        loss_of(program.train(), unlabelled, elbo), loss_of(program.eval(), unlabelled, elbo)
    )


def clusters(num: int) -> tuple[Tensor, Tensor]:
    """Three unequal clusters on the plane."""
    c = torch.randint(NUM_CLASSES, (num,))
    centres = torch.tensor([[2.0, 0.0], [-1.5, 1.5], [-0.5, -2.0]])
    return centres[c] + torch.tensor([0.3, 0.4, 0.5])[c, None] * torch.randn(num, 2), c


def test_a_label_of_each_class_names_the_clusters() -> None:
    """Six labels among 300 rows: >= 95 % of fresh rows classified; the same labels permuted, under a third."""
    x, c = clusters(300)
    fresh, truth = clusters(300)
    known = torch.cat([(c == k).nonzero()[:2, 0] for k in range(NUM_CLASSES)])

    def accuracy(labels: Tensor) -> float:
        torch.manual_seed(0)
        program = SemiSupervisedVAE.mlp((2,), 1, NUM_CLASSES, widths=(32,))
        optim = torch.optim.Adam(program.parameters(), lr=0.02)
        for _ in range(120):
            optim.zero_grad()
            unlabelled = loss_of(program, Batch({"x": x}), TraceEnum_ELBO(max_plate_nesting=1))
            labelled = loss_of(program, Batch({"x": x[known], "c": labels}), Trace_ELBO())
            (unlabelled + labelled).backward()
            optim.step()
        return float((program.classify(fresh).argmax(-1) == truth).float().mean())

    assert accuracy(c[known]) >= 0.95
    assert accuracy((c[known] + 1) % NUM_CLASSES) < 1 / 3


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (torch.tensor([0, 3]), "site 'c'"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([0, -1]), "Missing labels"),
    ],
)
def test_refuses_labels(labels: Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        small().guide(Batch({"x": torch.zeros(2, 4), "c": labels}))


def test_refuses_a_decoder_of_more_than_the_event() -> None:
    """Of a number too, where there is no dimension of the event to compare."""
    parts: dict[str, Any] = {"encoder": lambda *_: None, "decoder": lambda z, c: torch.cat([z, c], 1)}
    with pytest.raises(InputError, match=r"decoder .*\*\(\)\), got \(2, 5\)"):
        ConditionalVAE((), 2, 3, **parts).model(Batch(condition=torch.tensor([0, 1])))


@pytest.mark.parametrize("probs", [torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.0]), torch.ones(1, 1)])
def test_refuses_class_probabilities(probs: Tensor) -> None:
    parts: dict[str, Any] = dict.fromkeys(("encoder", "decoder", "classifier"), lambda *_: None)
    with pytest.raises(InputError, match="class_probs"):
        SemiSupervisedVAE((4,), 2, probs, **parts)


def test_refuses_a_negative_label_weight() -> None:
    with pytest.raises(InputError, match="label_weight"):
        small(label_weight=-1.0)
