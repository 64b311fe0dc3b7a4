import pyro
import pyro.distributions as dist
import torch

from probgen import ELBO, NUTS, SVI, Guide, digits, fit, infer, summary, to_arviz
from probgen.nets import MLP, GaussianMLP


class Digits(torch.nn.Module):  # a program: the joint density p(z) p(x | z), with its guide q(z | x)
    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = MLP((2,), (1, 8, 8), [64]), GaussianMLP((1, 8, 8), (2,), [64])

    def model(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.4).to_event(3))

    def guide(self, batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(*self.encoder(batch.data["x"])).to_event(1))


train, held_out = digits()
torch.manual_seed(0)
program = Digits()
print(fit(program, train, ELBO(), num_steps=500))
for engine in (Guide(), SVI(num_steps=300), NUTS(num_warmup=100)):
    posterior = infer(program, engine, data=held_out[:1], num_draws=250)  # the latents of one unseen digit
    print(summary(posterior))  # mean, sd, R-hat and effective sample size by ArviZ, and what to do about them
print(to_arviz(posterior))  # posterior, sample_stats, log_likelihood, posterior_predictive, prior, ...
