"""What `sample` and `infer` share: an engine with its options, a program, and what is kept of the draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probgen.cli.fitted import fitted_program, free_path, make_program, slug
from probgen.cli.naming import is_reference, own
from probgen.core import Posterior
from probgen.diagnostics.plots import image_grid
from probgen.report.entries import bounds_of, images_of

SHOWN = 100  # images in a picture


@dataclass(frozen=True)
class Source:
    """A program as the command line names it: a fitted run, or one in a file or module of yours."""

    name: str
    reference: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether it is a run folder."""
        return not is_reference(self.name)

    def program(self) -> Any:
        """The program; `InputError` where there is none."""
        if self.is_run:
            return fitted_program(Path(self.name), self.reference)
        thing = own(self.name)
        return make_program(thing, None, {}, seed=0) if isinstance(thing, type) else thing

    @property
    def folder(self) -> Path:
        """Where what is drawn is kept."""
        return Path(self.name) if self.is_run else Path("runs", slug(self.name))


def keep(posterior: Posterior, folder: Path, name: str) -> dict[str, str]:
    """Save the draws as `folder/name.nc`, and a picture of them where they are images; nothing is overwritten."""
    from probgen.saving import save

    path = free_path(folder, name, ".nc")
    save(posterior, path)
    kept = {"draws": str(path)}
    for site, images in images_of(posterior).items():
        picture = path.with_name(f"{path.stem}.png" if site == "x" else f"{path.stem}_{site}.png")
        image_grid(images[:SHOWN], picture, bounds=bounds_of(images), title=f"{site} by {posterior.engine}")
        kept.setdefault("picture", str(picture))
    return kept


def facts_of(posterior: Posterior) -> dict[str, Any]:
    """What the draws are and cost, for programs."""
    return {
        "engine": posterior.engine,
        "kind": posterior.kind,
        "guarantee": posterior.guarantee,
        "num_chains": posterior.num_chains,
        "num_draws": posterior.num_draws,
        "sites": {site: list(value.shape[2:]) for site, value in posterior.draws.items()},
        "cost": asdict(posterior.cost),
    }


def lines(kept: dict[str, str]) -> str:
    """Where things are, a line each."""
    return "\n".join(f"{what}: {path}" for what, path in kept.items())
