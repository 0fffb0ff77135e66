"""Train the small model: dense, then the indexer alone, then sparse. Stops and resumes at any step.

    PYTHONPATH=eval python -m small_model.train OUT [--steps 24000 300 900] [--seconds 540]

OUT gets state.pt (to resume from), log.jsonl, and, once trained, the checkpoint in DeepSeek's format.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from small_model.batches import Batch, batches, make_batch
from small_model.export import export
from small_model.model import Losses, Mode, SmallModel
from small_model.tasks import arithmetic, needle, tool_loop
from small_model.tokenizer import train_tokenizer
from vllm_dsv32.serving.encoding import encode_messages

STAGES = (Mode.DENSE, Mode.WARM_UP, Mode.SPARSE)
PEAK_RATE = {Mode.DENSE: 1.5e-3, Mode.WARM_UP: 2e-3, Mode.SPARSE: 5e-4}
CURRICULUM = ((0.0, (160, 256)), (0.1, (256, 512)), (0.3, (512, 1024, 2048)), (0.6, (1024, 2048, 4096)))
"""From which share of the dense stage on, texts of which lengths."""
DRAFT_WEIGHT = 0.1
MOST_SPOKEN = 8192
"""Tokens of a batch that are learned from at most."""
VOCABULARY = 1280

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 20480,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs=3, default=(24_000, 300, 900), help="of the three stages")
    parser.add_argument("--seconds", type=float, default=math.inf, help="save and stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    Trainer(arguments).run()


class Trainer:
    """The state of a training run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.end = time.monotonic() + arguments.seconds
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(arguments.seed)
        torch.set_float32_matmul_precision("high")
        self.tokenizer = self._tokenizer()
        self.model = SmallModel(CONFIG).to(self.device)
        indexer = [p for name, p in self.model.named_parameters() if ".indexer." in name]
        others = [p for name, p in self.model.named_parameters() if ".indexer." not in name]
        options = {"betas": (0.9, 0.95), "fused": True, "capturable": self.device.type == "cuda"}
        self.optimizers = {
            name: torch.optim.AdamW(group, lr=torch.zeros((), device=self.device), weight_decay=decay, **options)
            for name, group, decay in (("indexer", indexer, 0.01), ("model", others, 0.05))
        }
        self.graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor], Losses]] = {}
        self.step = 0
        self.smooth: dict[str, float] = {}
        self.seconds_before = 0.0
        self._resume()

    def _tokenizer(self) -> Tokenizer:
        path = self.out / "tokenizer.json"
        if not path.exists():
            source = random.Random(self.a.seed)
            chats = [tool_loop(source) for _ in range(1500)] + [arithmetic(source) for _ in range(4000)]
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
        self.step, self.smooth, self.seconds_before = state["step"], state["smooth"], state["seconds"]
        print(f"resumed at step {self.step}", flush=True)

    def _save(self, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "step": self.step,
            "smooth": self.smooth,
            "seconds": seconds,
        }
        torch.save(state, self.out / "state.pt")

    def _stage(self) -> tuple[Mode, float]:
        """The stage of this step, and how far in it, 0 to 1."""
        step = self.step
        for mode, steps in zip(STAGES, self.a.steps, strict=True):
            if step < steps:
                return mode, step / steps
            step -= steps
        return Mode.SPARSE, 1.0

    def _lengths(self) -> tuple[int, ...]:
        mode, share = self._stage()
        if mode is not Mode.DENSE:
            return CURRICULUM[-1][1]
        return next(lengths for begin, lengths in reversed(CURRICULUM) if share >= begin)

    def run(self) -> None:
        """Train until the last step, or until the time is up."""
        begin = time.monotonic()
        total = sum(self.a.steps)
        log = (self.out / "log.jsonl").open("a")
        lengths, stream = None, None
        while self.step < total and time.monotonic() < self.end:
            if lengths != self._lengths():
                lengths = self._lengths()
                if stream is not None:
                    stream.close()
                stream = batches(str(self.out / "tokenizer.json"), self.a.seed + self.step, lengths, self.a.workers)
            mode, share = self._stage()
            batch = next(stream)
            losses = self._train_step(batch, mode, share)
            self.step += 1
            if self.step % 25 == 0:
                self._note(batch.task, losses)
            if self.step % (2000 if mode is Mode.DENSE else 100) == 0 or self.step == total:
                seconds = self.seconds_before + time.monotonic() - begin
                entry = {"step": self.step, "stage": mode.value, "seconds": round(seconds), **self.smooth}
                if self.step % (4000 if mode is Mode.DENSE else 200) == 0 or self.step == total:
                    entry["exact"] = self.exact_shares(mode)
                print(json.dumps(entry), flush=True)
                log.write(json.dumps(entry) + "\n")
                log.flush()
        self._save(self.seconds_before + time.monotonic() - begin)
        if stream is not None:
            stream.close()
        if self.step >= total:
            export(self.model, self.tokenizer, self.out / "checkpoint")
        print("done" if self.step >= total else "stopped", self.step, flush=True)

    def _train_step(self, batch: Batch, mode: Mode, share: float) -> Losses:
        """One step; of the dense stage, whose kernels are short, a recorded one."""
        self.model.train()
        rate = PEAK_RATE[mode] * min(1.0, (self.step + 1) / 200) * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
        at = np.argwhere(batch.spoken)[:MOST_SPOKEN]
        spoken_at = np.tile(np.array([0, 2]), (MOST_SPOKEN, 1))
        spoken_at[: len(at)] = at
        inputs = self._to_device(batch.ids, batch.positions, spoken_at, np.array([len(at)]))
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

    def _step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        spoken_at: torch.Tensor,
        num_spoken: torch.Tensor,
        mode: Mode,
    ) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            losses = self.model.losses(ids, positions, spoken_at, num_spoken, mode)
        loss = losses.indexer
        if mode is not Mode.WARM_UP:
            loss = loss + losses.language + DRAFT_WEIGHT * losses.draft
        loss.backward()
        trained = {Mode.DENSE: ("model",), Mode.WARM_UP: ("indexer",), Mode.SPARSE: ("model", "indexer")}[mode]
        for name in trained:
            optimizer = self.optimizers[name]
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return losses

    def _note(self, task: str, losses: Losses) -> None:
        values = {f"loss {task}": losses.language, "draft": losses.draft, "indexer": losses.indexer}
        if task == "needle":
            values["recall"] = losses.recall
        for name, value in values.items():
            self.smooth[name] = round(0.5 * self.smooth.get(name, value.item()) + 0.5 * value.item(), 4)

    def _to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    @torch.no_grad()
    def exact_shares(self, mode: Mode, rows: int = 64) -> dict[str, float]:
        """Share of held-out chats in which every spoken token is the most likely one."""
        self.model.eval()
        source = random.Random(12345)
        shares = {}
        wanted: list[tuple[str, int]] = [("tools", 768), ("arithmetic", 96), ("needle", 1024), ("needle", 4096)]
        if self.step >= sum(self.a.steps[:1]) * 0.6:
            wanted.append(("needle", 16_384))
        for task, length in wanted:
            num_right = num_asked = 0
            per_batch = max(1, min(rows, TOKENS_AT_ONCE // length))
            num_rows = rows if length <= 4096 else 24
            for _ in range(0, num_rows, per_batch):
                batch = make_batch(self.tokenizer, source, task, length, "test", per_batch)
                ids, positions, spoken = self._to_device(batch.ids, batch.positions, batch.spoken)
                with torch.autocast(self.device.type, torch.bfloat16):
                    hidden, _ = self.model(ids, positions, Mode.DENSE if mode is Mode.WARM_UP else mode)
                    best = self.model.lm_head(hidden).argmax(-1)
                wrong = (best[:, :-1] != ids[:, 1:]) & spoken[:, 1:]
                num_right += int((~wrong.any(-1)).sum())
                num_asked += per_batch
            name = task if task != "needle" else f"needle {length}"
            shares[name] = round(num_right / num_asked, 3)
        return shares


TOKENS_AT_ONCE = 16_384


if __name__ == "__main__":
    main()
