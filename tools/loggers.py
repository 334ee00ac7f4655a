"""Send the log of a run to tensorboard or wandb as well."""

from pathlib import Path

from common import UserError


def open_logger(s, step):
    """Return a function of ({name: number}, step). Raises UserError if the package that `logger` names is missing."""
    try:
        if s.logger == "wandb":
            import wandb

            name = s.out.strip("/").replace("/", "-")
            return wandb.init(project="nanomusicgen", id=name, name=name, config=vars(s), resume="allow", dir=s.out).log
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(s.out, "tensorboard"), purge_step=step)
        return lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]
    except ImportError:
        raise UserError(f"logger = '{s.logger}': not installed; pip install {s.logger}") from None
