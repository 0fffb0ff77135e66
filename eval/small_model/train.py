"""Train the small model: dense, then the indexer alone, then sparse. Stops and resumes at any step.

    PYTHONPATH=eval python -m small_model.train OUT [--steps 40000 300 4000] [--seconds 540]

OUT gets state.pt (to resume from), log.jsonl and, once trained, the checkpoint in DeepSeek's format and the
training's curves. On an H200 a dense step takes about 14 ms, a sparse one 80 ms and 23 GB.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from small_model.batches import Batch, batches
from small_model.curves import plot
from small_model.export import export
from small_model.held_out import exact_shares
from small_model.model import Losses, Mode, SmallModel
from small_model.recipe import CONFIG, VOCABULARY, Recipe
from small_model.tasks import arithmetic, needle, tool_loop
from small_model.tokenizer import train_tokenizer
from vllm_dsv32.serving.encoding import encode_messages

__all__ = ["Trainer"]

_TRAINED = {Mode.DENSE: ("model",), Mode.WARM_UP: ("indexer",), Mode.SPARSE: ("model", "indexer")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs=3, default=Recipe().steps, help="of the three stages")
    parser.add_argument("--seconds", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="processes that make data")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    trainer = Trainer(arguments.out, Recipe(steps=tuple(arguments.steps)), arguments.seed, CONFIG)
    trainer.run(arguments.workers, end)


class Trainer:
    """The state of a training run."""

    def __init__(self, out: Path, recipe: Recipe, seed: int, config: dict[str, Any]) -> None:
        """Begin, or go on from ``out/state.pt``."""
        self.clock: Callable[[], float] = time.monotonic
        self.out, self.recipe, self.seed = out, recipe, seed
        out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        self.tokenizer = self._tokenizer()
        self.model = SmallModel(config).to(self.device)
        self.parameters = {
            "indexer": [p for name, p in self.model.named_parameters() if ".indexer." in name],
            "model": [p for name, p in self.model.named_parameters() if ".indexer." not in name],
        }
        options = {"betas": (0.9, recipe.beta2), "fused": True, "capturable": self.device.type == "cuda"}
        self.optimizers = {
            name: torch.optim.AdamW(
                self.parameters[name], lr=torch.zeros((), device=self.device), weight_decay=decay, **options
            )
            for name, decay in (("indexer", 0.01), ("model", 0.05))
        }
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Losses]] = {}
        self.step = 0
        self.seconds_before = 0.0
        self._resume()

    def _tokenizer(self) -> Tokenizer:
        path = self.out / "tokenizer.json"
        if not path.exists():
            source = random.Random(self.seed)
            # Without cities: a name nobody saw is then spelled like those that were seen.
            chats = [tool_loop(source, city="") for _ in range(1500)] + [arithmetic(source) for _ in range(4000)]
            chats += [needle(source, "train", 600, len) for _ in range(400)]
            texts = (encode_messages(c.messages, tools=c.tools or None, thinking=c.thinking) for c in chats)
            train_tokenizer(texts, VOCABULARY).save(str(path))
        return Tokenizer.from_file(str(path))

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds_before = state["step"], state["seconds"]

    def _save(self, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "step": self.step,
            "seconds": seconds,
        }
        torch.save(state, self.out / "state.pt")

    def run(self, workers: int, end: float = math.inf) -> None:
        """Train until the last step, or until the clock reaches ``end``.

        Args:
            workers: processes that make data; what is trained does not depend on them.
            end: seconds.
        """
        recipe, begin = self.recipe, self.clock() - self.seconds_before
        total = sum(recipe.steps)
        stream = batches(
            str(self.out / "tokenizer.json"), self.seed, recipe.lengths, recipe.tokens, self.step, workers
        )
        with (self.out / "log.jsonl").open("a") as log, tqdm(total=total, initial=self.step, mininterval=5) as bar:
            while self.step < total and self.clock() < end:
                mode, _ = recipe.stage(self.step)
                batch = next(stream)
                losses = self._train_step(batch, mode)
                self.step += 1
                bar.update()
                entry: dict[str, Any] = {}
                if self.step % (100 if mode is Mode.DENSE else 10) == 0:
                    entry |= {"task": batch.task, **_readable(losses, mode)}
                if self.step % (6000 if mode is Mode.DENSE else 500) == 0 or self.step in (total, recipe.steps[0]):
                    entry |= {"exact": self._exact(mode)}
                if entry:
                    head = {"step": self.step, "stage": mode.value, "seconds": round(self.clock() - begin)}
                    log.write(json.dumps(head | entry) + "\n")
                    log.flush()
                    bar.set_postfix_str(f"{mode.value}, " + ", ".join(f"{k} {v}" for k, v in entry.items()))
        stream.close()
        self._save(self.clock() - begin)
        if self.step >= total:
            export(self.model, self.tokenizer, self.out / "checkpoint")
            plot(self.out / "log.jsonl", self.out)

    def _train_step(self, batch: Batch, mode: Mode) -> Losses:
        """One step; of the dense stage, whose kernels are short, a recorded one."""
        self.model.train()
        for parameter in self.parameters["model"]:
            parameter.requires_grad_("model" in _TRAINED[mode])
        rate = self.recipe.rate(self.step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
        inputs = self._to_device(batch.ids, batch.positions, batch.spoken)
        if mode is not Mode.DENSE or self.device.type != "cuda":
            return self._step(*inputs, mode)
        key = batch.ids.shape
        if key not in self.graphs:
            self.graphs[key] = self._record(inputs, mode)
        graph, static_inputs, losses = self.graphs[key]
        for static, value in zip(static_inputs, inputs, strict=True):
            static.copy_(value)
        graph.replay()
        return losses

    def _record(
        self, inputs: list[torch.Tensor], mode: Mode
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Losses]:
        static_inputs = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(*static_inputs, mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self._step(*static_inputs, mode)
        return graph, static_inputs, losses

    def _step(self, ids: torch.Tensor, positions: torch.Tensor, spoken: torch.Tensor, mode: Mode) -> Losses:
        # The processors that the tests run on are slower in bfloat16.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            losses = self.model.losses(ids, positions, spoken, mode)
        loss = losses.indexer
        if mode is not Mode.WARM_UP:
            loss = loss + losses.language + self.recipe.draft_weight * losses.draft
        loss.backward()
        for name in _TRAINED[mode]:
            torch.nn.utils.clip_grad_norm_(self.parameters[name], 1.0)
            self.optimizers[name].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return losses

    def _to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def _exact(self, mode: Mode) -> dict[str, float]:
        self.model.eval()
        mode = Mode.DENSE if mode is Mode.WARM_UP else mode
        return exact_shares(self.model, self.tokenizer, mode, (1024, 4096, 16_384))


def _readable(losses: Losses, mode: Mode) -> dict[str, float]:
    values = {"loss": losses.language, "draft": losses.draft}
    if mode is not Mode.DENSE:
        values |= {"indexer": losses.indexer, "recall": losses.recall}
    return {name: round(value.item(), 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
