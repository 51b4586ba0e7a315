"""Train a small WideNet on 1,797 real handwritten digits, and say how many of the held-out ones it reads.

    python examples/train_digits.py                 # about a minute on one core
    python examples/train_digits.py --dense         # the same network with one shared dense FFN instead of experts
    python examples/train_digits.py --resume        # go on where an interrupted run stopped, to the same bits

The run lives in the folder --out: checkpoint.pt (after every epoch) and training.png.
"""

import argparse
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from digits_plot import save_plot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from widenet_kernels.models import WideNetConfig, WideNetForImageClassification, WideNetOutput

TARGET = 0.97
BATCH = 32
LEARNING_RATE = 3e-3
WARP = 0.05
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C

Record = dict[str, Any]  # one epoch of the history


class Digits(NamedTuple):
    """The images, 8 x 8 pixels from -1 to 1, and the digit that each one shows."""

    train_images: Tensor  # [1437, 1, 8, 8]
    train_labels: Tensor  # [1437]
    held_out_images: Tensor  # [360, 1, 8, 8]
    held_out_labels: Tensor  # [360]


def load_split() -> Digits:
    """A fifth of each digit's images is held out, the same ones whatever the seed of the training."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def warp(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image turned, stretched, slanted and moved by its own small random map: no two epochs see the same ones."""
    maps = torch.eye(2, 3) + WARP * torch.randn(len(images), 2, 3, generator=generator)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # + 1: what comes from outside is 0, background


def network(dense: bool, backend: str | None) -> WideNetForImageClassification:
    config = WideNetConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        ffn_size=192,
        num_layers=4,
        num_heads=6,
        num_classes=10,
        label_smoothing=0.1,
        dense=dense,
        backend=backend,
    )
    return WideNetForImageClassification(config)


class Run:
    """Everything that a checkpoint holds, and the steps that change it."""

    def __init__(self, settings: dict[str, Any], digits: Digits) -> None:
        self.settings, self.digits = settings, digits
        self.epochs = settings["epochs"]
        torch.manual_seed(settings["seed"])
        self.model = network(settings["dense"], settings["backend"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.steps_per_epoch = -(-len(digits.train_labels) // BATCH)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=self.epochs * self.steps_per_epoch
        )
        self.history: list[Record] = []

    def save(self, path: pathlib.Path) -> None:
        """All or nothing: whoever is interrupted while writing still has the checkpoint before."""
        partial = path.with_suffix(".partial")
        state = {
            "settings": self.settings,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),  # the images' order and maps, dropout, the router's noise
        }
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: pathlib.Path) -> None:
        """Raises ValueError for a checkpoint of another run."""
        state = torch.load(path)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(f"--resume: {path} has {name} = {state['settings'][name]}, this command {value}")
        self.history = state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])

    def train_epoch(self, bar: tqdm) -> Record:
        start = time.perf_counter()
        images, labels = self.digits.train_images, self.digits.train_labels
        self.model.train()
        loss_sum = right = 0.0
        for batch in torch.randperm(len(labels)).split(BATCH):
            output = self.model(warp(images[batch]), labels[batch])
            self.optimizer.zero_grad()
            output.loss.backward()
            self.optimizer.step()
            self.schedule.step()
            loss_sum += output.loss.item() * len(batch)
            right += count_right(output, labels[batch])
            bar.update()
        return {
            "loss": loss_sum / len(labels),
            "train_accuracy": right / len(labels),
            **self.held_out(),
            "seconds": time.perf_counter() - start,
        }

    @torch.inference_mode()
    def held_out(self) -> Record:
        """Accuracy on the held-out images, and where the router sent their patches; None when dense."""
        labels = self.digits.held_out_labels
        self.model.eval()
        output = self.model(self.digits.held_out_images, labels)
        record: Record = {"accuracy": count_right(output, labels) / len(labels)}
        if not output.routing:
            return record | {"dropped": None, "balance": None, "load": None}
        demand = torch.stack([aux.expert_demand for aux in output.routing])  # [depths, E]
        return record | {
            "dropped": torch.stack([aux.dropped_share for aux in output.routing]).mean().item(),
            "balance": output.aux_loss.item() / len(output.routing),
            "load": (demand / demand.sum(dim=1, keepdim=True)).tolist(),
        }


def count_right(output: WideNetOutput, labels: Tensor) -> int:
    return int((output.logits.argmax(dim=1) == labels).sum())


def table_line(epoch: int, record: Record) -> str:
    dropped = "-" if record["dropped"] is None else f"{record['dropped']:.1%}"
    balance = "-" if record["balance"] is None else f"{record['balance']:.3f}"
    return (
        f"{epoch:5d}  {record['loss']:7.4f}  {record['train_accuracy']:8.1%}  {record['accuracy']:8.1%}  "
        f"{dropped:>7}  {balance:>7}"
    )


def train(run: Run, checkpoint: pathlib.Path) -> None:
    """The remaining epochs, with a checkpoint behind each and one in front of the first."""
    if not run.history:
        run.save(checkpoint)
    print("epoch     loss     train  held-out  dropped  balance")
    for epoch, record in enumerate(run.history, start=1):
        print(table_line(epoch, record))
    done = len(run.history)
    total = run.epochs * run.steps_per_epoch
    with tqdm(total=total, initial=done * run.steps_per_epoch, unit="step", leave=False, disable=None) as bar:
        for epoch in range(done + 1, run.epochs + 1):
            record = run.train_epoch(bar)
            run.history.append(record)
            run.save(checkpoint)
            bar.write(table_line(epoch, record))


def verdict(history: list[Record]) -> str:
    accuracy = history[-1]["accuracy"]
    seconds = sum(record["seconds"] for record in history)
    reached = "reached" if accuracy >= TARGET else "not reached"
    return (
        f"held-out accuracy {100 * accuracy:.1f} % after {len(history)} epochs in {seconds:.0f} s "
        f"(target {100 * TARGET:.0f} %: {reached})"
    )


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--dense", action="store_true", help="one shared dense FFN in place of router and experts")
    parser.add_argument("--backend", help="native, triton or reference; default: the best there is")
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything random but the choice of the held-out images"
    )
    parser.add_argument("--threads", type=int, default=1, help="more wait for each other where other programs run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/digits"), metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    return parser


def main(argv: Sequence[str]) -> int:
    """Train, draw, tell; 0 whether or not the target was reached, 130 after Ctrl-C."""
    parser = options()
    args = parser.parse_args(argv)
    checkpoint = args.out / "checkpoint.pt"
    for name in ("epochs", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.resume and not checkpoint.exists():
        parser.error(f"--resume: expected a checkpoint in {args.out}, found none")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("epochs", "dense", "backend", "seed", "threads")}
    run = Run(settings, load_split())
    if args.resume:
        try:
            run.load(checkpoint)
        except ValueError as error:
            parser.error(str(error))
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"WideNet{', dense' if args.dense else ''}: {parameters:,} parameters, {args.threads} threads")
    try:
        train(run, checkpoint)
    except KeyboardInterrupt:
        done = len(torch.load(checkpoint)["history"])
        command = shlex.join([sys.executable, sys.argv[0], *argv, *(() if args.resume else ("--resume",))])
        print(f"interrupted: {checkpoint} holds {done} of {args.epochs} epochs; to go on: {command}")
        return INTERRUPTED
    picture = args.out / "training.png"
    save_plot(run.history, TARGET, picture)
    print(f"learning curves and expert load: {picture}")
    print(verdict(run.history))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
