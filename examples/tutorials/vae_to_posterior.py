# %% [markdown]
# # From a VAE to a posterior
#
# A variational autoencoder is usually trained, and then its encoder is believed. Here the fitted program
# stays a program: what its latents are for a digit it has never seen is a question with one right answer, p(z
# | x), and three engines give theirs. With two latents the right answer can be computed on a grid, so that
# nobody need be believed.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from probgen import (
    ELBO,
    NUTS,
    SVI,
    VAE,
    ELBOEstimate,
    Guide,
    ImportanceWeighted,
    Optim,
    agree,
    digits,
    evidence,
    fit,
    infer,
    predict,
    summary,
    to_arviz,
)
from probgen.diagnostics.plots import plot_ranks, reconstruction_grid
from probgen.models import GaussianLikelihood

quick = "--quick" in sys.argv  # a few steps of everything: shows the way, proves nothing
out = Path("runs/vae_to_posterior")
out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)


def numbers(values: torch.Tensor) -> str:
    return " and ".join(f"{value:+.3f}" for value in values)


# %% [markdown]
# ## The program and its fit
#
# $z \sim \mathcal{N}(0, I_2)$, $x \mid z \sim \mathcal{N}(f(z), s^2 I)$, with guide $q(z \mid x) =
# \mathcal{N}(\mu(x), \mathrm{diag}\,\sigma^2(x))$. `fit` maximises the ELBO; s is learnt too.

# %%
train, held_out = digits()
vae = VAE.mlp(train.event_shape, latent_dim=2, widths=(128, 128), likelihood=GaussianLikelihood(0.4))
optim = Optim(lr=3e-3, schedule="cosine", ema_decay=0.99)
history = fit(vae, train, ELBO(), num_steps=20 if quick else 2000, validation=held_out, optim=optim)
print(history)

# %% [markdown]
# What two numbers keep of a digit: held-out digits above, what the program expects to see again below.

# %%
shown = held_out.all()[:20]
seen_again = predict(infer(vae, Guide(), data=shown, num_draws=100))["x"].mean((0, 1))
reconstruction_grid(shown, seen_again, out / "reconstructions.png")

# %% [markdown]
# ![Held-out digits and their reconstructions](vae_to_posterior_reconstructions.png)
#
# ## The right answer
#
# In two dimensions $p(z \mid x) \propto p(z)\, p(x \mid z)$ can be tabulated, and its sum is $p(x)$. With
# that the price of believing the encoder is known: $\log p(x) - \mathrm{ELBO}(x) = \mathrm{KL}(q(z \mid x)
# \,\|\, p(z \mid x))$.

# %%
axis = torch.linspace(-5, 5, 100 if quick else 500)
grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
with torch.no_grad():
    law, log_prior = vae.law_of_x(grid), torch.distributions.Normal(0.0, 1.0).log_prob(grid).sum(1)
    log_joint = torch.stack([log_prior + law.log_prob(image) for image in shown])
log_evidence = (log_joint + cell.log()).logsumexp(1)
bound = evidence(vae, ELBOEstimate(num_particles=20 if quick else 200), shown)
gap = log_evidence - bound.value
print(f"the guide loses {gap.median():.1f} nats of a digit, {gap.min():.1f} to {gap.max():.1f}")

# %% [markdown]
# ## One digit, three engines
#
# We take the digit whose loss is the median. The same call, another engine: `Guide` asks the encoder once;
# `SVI` fits a Gaussian to this very digit; `NUTS` runs Markov chains on the posterior itself, from draws of
# the guide.

# %%
chosen = gap.argsort()[len(gap) // 2].item()
x = shown[chosen : chosen + 1]
guess = infer(vae, Guide(), data=x, num_draws=400, num_chains=4)
posteriors = {
    "Guide": guess,
    "SVI": infer(vae, SVI(num_steps=20 if quick else 500), data=x, num_draws=1600),
    "NUTS": infer(
        vae, NUTS(num_warmup=20 if quick else 200), data=x, num_draws=400, num_chains=4, init=guess
    ),
}
print(summary(posteriors["NUTS"]))

# %% [markdown]
# R-hat and effective sample sizes are ArviZ's. Draws of the other two are independent: R-hat would be 1 and
# say nothing, and their summary says so.

# %%
print(summary(posteriors["Guide"]))

# %%
weights = log_joint[chosen].softmax(0)
mean = weights @ grid
sd = (weights @ (grid - mean).square()).sqrt()
print(f"on the grid: mean {numbers(mean)}, sd {numbers(sd)}")

# %%
figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.4), sharex=True, sharey=True, layout="constrained")
density = weights.reshape(len(axis), -1).T.numpy()
levels = [density.max() * share for share in (0.01, 0.1, 0.5)]
drawn = torch.cat([posterior.flat("z")[:, 0] for posterior in posteriors.values()])
(left, bottom), (right, top) = drawn.min(0).values.tolist(), drawn.max(0).values.tolist()
for panel, (name, posterior) in zip(panels, posteriors.items(), strict=True):
    panel.plot(*posterior.flat("z")[::2, 0].T.numpy(), ".", markersize=2, alpha=0.4)
    panel.contour(axis.numpy(), axis.numpy(), density, levels=levels, colors="black", linewidths=1)
    panel.set(title=name, xlabel="$z_1$", xlim=(left, right))
panels[0].set(ylabel="$z_2$", ylim=(bottom, top))
figure.savefig(out / "posteriors.png", dpi=130)
plt.close(figure)

# %% [markdown]
# ![Draws of the three engines on contours of the exact posterior](vae_to_posterior_posteriors.png)
#
# Contours: the posterior on the grid, at 1, 10 and 50 % of its peak. Dots: draws. The same in numbers, and
# what `agree` makes of it:

# %%
for name, posterior in posteriors.items():
    z = posterior.flat("z")[:, 0]
    off, wider = (z.mean(0) - mean) / sd, z.std(0) / sd - 1
    print(f"{name:5}: means off by {numbers(off)} sd; sds too large by {numbers(100 * wider)} %")
print(agree(posteriors))

# %% [markdown]
# ## The evidence
#
# log p(x) of this digit. The ELBO is a bound, and its gap is what the encoder gives away. Importance sampling
# corrects draws of the guide by their weights. Where the guide misses mass it may fail, and its standard
# error would not tell; Pareto's k-hat warns of that, here although the number is right. The grid is the
# judge.

# %%
weighted = evidence(vae, ImportanceWeighted(num_samples=200 if quick else 20_000), x)
print(f"ELBO: {bound.value[chosen]:.2f} nats\n{weighted}\ngrid: {log_evidence[chosen]:.2f} nats")

# %% [markdown]
# ## On to ArviZ
#
# `to_arviz` hands over everything ArviZ has a place for; from there its own plots, LOO and model comparison
# are a call away, and the file can be read by anybody.

# %%
data = to_arviz(posteriors["NUTS"])
data.to_netcdf(str(out / "nuts.nc"))
print(list(data.groups()))
plot_ranks(posteriors["NUTS"], out / "ranks.png")

# %% [markdown]
# ![Ranks of the draws of each chain](vae_to_posterior_ranks.png)
#
# ## What was claimed
#
# Checked every time the script runs:

# %%
if not quick:
    verdict = summary(posteriors["NUTS"])
    z = posteriors["NUTS"].flat("z")[:, 0]
    error = sd / verdict.table["ess_bulk"].min() ** 0.5
    assert verdict.ok
    assert ((z.mean(0) - mean).abs() < 4 * error).all()  # NUTS draws from the posterior
    assert (gap > -4 * bound.standard_error).all()  # the ELBO is a bound
    off = abs(weighted.value.item() - log_evidence[chosen].item())
    assert not weighted.trusted or off < 4 * weighted.standard_error.item()  # right, or says that it is not
    print("NUTS meets the grid; the ELBO lies below it; importance sampling meets it, or warns.")
