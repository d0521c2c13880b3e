"""What sketches of gradients miss and cost on SmolLM2-135M's own language-model loss: the tables of docs/gradients.md.

    python benchmarks/gradients.py schemes [--every N] [--rank R] [--output FILE]
    python benchmarks/gradients.py ranks [--every N]
    python benchmarks/gradients.py starts [--every N] [--rank R] [--batches N] [--methods lora-ga ...]
    python benchmarks/gradients.py turns [--rank R] [--batches N] [--checkpointing]
    python benchmarks/gradients.py cost [--rank R] [--batches N]
    python benchmarks/gradients.py share [--rank R]

``schemes`` takes the exact gradients of four batches of 4 × 128 tokens, each from one backward pass in float32,
decomposes them in float64, and lets each scheme see products of them with its columns alone. Of each scheme: what it
keeps of the gradients' size, the smallest cosine between its leading R singular vectors and the exact ones on either
side, and what of their energy is lost; the worst of all layers.

``ranks`` does so for ranks of 1 to 8 and the directions that LoRA-One and LoRA-GA take: five passes of 5 R columns, and
of as many as ``initialize`` takes.

``starts`` starts an adapter by each method and says what that has done to the loss; of LoRA-GA also the cosine between
the first step of plain gradient descent on A and B and the gradient that full fine-tuning would follow, beside the best
that so many directions of the exact gradient could have.

``turns`` runs the five passes of LoRA-GA with their algebra, after each pass two plain forwards and backwards of the
frozen model on the same batches, of which the first is left out, since it takes memory anew that the pass has given
back: the processor's time on one thread of one process, so that whatever else the machine does is the same for both.

``cost`` runs the five passes of LoRA-GA with their algebra, and as many plain forwards and backwards of the same
batches, each in a process of its own, on one thread, with gradient checkpointing and without: seconds of the
processor's time, and two peaks of memory above that of model and batches: what tensors took, by PyTorch's allocator,
to the byte, and what the process held, which is also what the C library keeps for reuse. The plain ones are those of
the frozen model, and those that form each weight's gradient and let go of it at once: what a method that holds G has
beside G.

``share`` says what a faster form of the products could gain: of a block of SmolLM2's linear layers and 512 tokens, by
turns in one process, the processor's time of a forward and a backward of the frozen layers, and of the sketch's parts,
and how fast either multiplies. A faster form would at best be as fast as the layers' own products: the last column is
what that would save of all this.
"""

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eva_kernels.gradient_sketch import leading_part, outer_add_, projected, random_basis, range_basis
from eva_lora import METHODS, initialize
from eva_lora.adapters import find_adapter
from eva_lora.cli.demo import load_smollm2, packed_text
from eva_lora.collecting import Asked, GradientPasses
from eva_lora.config import EvaConfig
from eva_lora.fitting import GradientMethod, fit_leading, sketch_columns
from eva_lora.planning import versions
from harness.memory import resident_peak, tensor_bytes

RANK = 8
BATCHES = 4
#: Passes, and columns for each rank.
SCHEMES = [
    *((1, 16), (2, 4), (2, 8), (2, 16), (3, 4), (3, 8), (4, 4), (4, 5), (4, 6), (4, 8)),
    *((5, 3), (5, 4), (5, 5), (5, 6), (6, 3), (6, 4)),
]

#: Forwards and backwards of the frozen model; those that form each weight's gradient; ours.
SIDES = ["frozen", "formed", "sketches"]

Pair = tuple[Tensor, Tensor]  # U (m, k) and V (n, k)


def load(count: int = BATCHES, sequences: int = 4) -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    """SmolLM2, batches with labels, and its linear layers but for the output head."""
    model, tokenizer = load_smollm2(echo=lambda message: None)
    texts = list(packed_text(tokenizer, sequences=sequences, tokens=128))
    batches = [
        dict(texts[i * len(texts) // count], labels=texts[i * len(texts) // count]["input_ids"]) for i in range(count)
    ]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    return model.eval(), batches, layers


def exact_gradients(model: nn.Module, batches: list[dict[str, Tensor]], layers: list[str]) -> dict[str, Tensor]:
    """Layer → the gradient of the mean loss over the batches, (out, in) float32."""
    model.requires_grad_(False)
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in layers}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    found = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    return found


def iterated(gradient: Tensor, passes: int, columns: int) -> Pair:
    """A pass's products go into the next one's basis; the first multiplies G with noise."""
    basis, product, left = random_basis(gradient.shape[1], columns), gradient, False
    for index in range(passes):
        product = (gradient.T if left else gradient) @ basis.to(gradient.dtype)
        if index < passes - 1:
            basis, left = range_basis(product), not left
    found = leading_part(basis, product, columns)
    return (found.right, found.left) if left else (found.left, found.right)


def in_one_pass(gradient: Tensor, columns: int) -> Pair:
    """G Ω and Gᵀ Ψ of noise Ω, and of twice as many columns Ψ (generalised Nyström)."""
    omega, psi = (
        random_basis(n, c, seed=c).to(gradient)
        for n, c in zip(gradient.shape[::-1], (columns, 2 * columns), strict=True)
    )
    q = torch.linalg.qr(gradient @ omega).Q
    core = torch.linalg.lstsq(psi.T @ q, (gradient.T @ psi).T).solution
    u, _, vt = torch.linalg.svd(core, full_matrices=False)
    return q @ u, vt.T


def kept_of(gradient: Tensor, columns: int) -> int:
    """Bytes: a basis in bfloat16 of one side, and a product in float32 of the other, the dearer way round."""
    m, n = gradient.shape
    return columns * max(4 * m + 2 * n, 2 * m + 4 * n)


def schemes(every: int, rank: int) -> list[dict[str, Any]]:
    model, batches, layers = load()
    gradients = exact_gradients(model, batches, layers)
    whole = sum(g.nbytes for g in gradients.values())
    rows: list[dict[str, Any]] = []
    for passes, times in SCHEMES:
        kept = sum(kept_of(g, min(times * rank, *g.shape)) for g in gradients.values())
        rows.append({"passes": passes, "columns": times, "kept": kept / whole, "cosines": [], "lost": []})
    for name in layers[::every]:
        g = gradients[name].double()
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        for row in rows:
            columns = min(row["columns"] * rank, *g.shape)
            pair = in_one_pass(g, columns // 2) if row["passes"] == 1 else iterated(g, row["passes"], columns)
            note(row, g, (u, s, vt), pair, rank)
        print(name, flush=True)
    return rows


def note(row: dict[str, Any], g: Tensor, exact: tuple[Tensor, Tensor, Tensor], pair: Pair, count: int) -> None:
    """What ``pair`` misses of a gradient's leading ``count`` directions, into a row."""
    u, s, vt = exact
    mine, its = (x[:, :count] for x in pair)
    sides = ((u[:, :count], mine, mine.T @ g), (vt[:count].T, its, g @ its))
    row["cosines"].append(min(float(torch.linalg.svdvals(best.T @ found)[-1]) for best, found, _ in sides))
    row["lost"].append(max(float(1 - image.square().sum() / s[:count].square().sum()) for *_, image in sides))


def ranks(every: int) -> str:
    model, batches, layers = load()
    gradients = exact_gradients(model, batches, layers)
    rows: list[dict[str, Any]] = []
    for rank in (1, 2, 4, RANK):
        for name in ("lora-one", "lora-ga"):
            method: Any = METHODS[name]
            for columns in dict.fromkeys((5 * rank, sketch_columns(method, rank, EvaConfig(rho=1.0)))):
                row = {"method": name, "rank": rank, "taken": method.blocks * rank, "columns": columns}
                rows.append(row | {"cosines": [], "lost": []})
    for layer in layers[::every]:
        g = gradients[layer].double()
        exact = torch.linalg.svd(g, full_matrices=False)
        pairs = {columns: iterated(g, 5, min(columns, *g.shape)) for columns in {row["columns"] for row in rows}}
        for row in rows:
            note(row, g, exact, pairs[row["columns"]], row["taken"])
        print(layer, flush=True)
    lines = ["| | r | directions | columns | smallest cosine, worst | median | energy lost, worst |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cosines, lost = torch.tensor(row["cosines"]), f"{max(row['lost']):.1e}"
        taken = f"{row['method']} | {row['rank']} | {row['taken']} | {row['columns']}"
        lines.append(f"| {taken} | {cosines.min():.4f} | {cosines.median():.4f} | {lost} |")
    return "\n".join(lines)


def adapted(model: nn.Module, layers: list[str], rank: int) -> Any:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


def starts(rank: int, count: int, methods: list[str], every: int) -> str:
    model, batches, layers = load(count)
    gradients = exact_gradients(model, batches, layers)
    lines = [
        "| method | loss before | after a step | seconds | of the step's cosine with G: worst below the best | mean |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for method in methods:
        mine = adapted(copy.deepcopy(model), layers, rank)
        report: Any = initialize(mine, batches, method)
        missing = []
        for name in layers[::every] if method.startswith("lora-ga") else ():
            layer, g = mine.get_base_model().get_submodule(name), gradients[name].double()
            a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
            step, values = b @ (b.T @ g) + (g @ a.T) @ a, torch.linalg.svdvals(g)
            best = (values[: 2 * rank].square().sum() / values.square().sum()).sqrt()
            missing.append(float(best - (step * g).sum() / step.norm() / g.norm()))
        found = f"{max(missing):.4f} | {sum(missing) / len(missing):.4f}" if missing else "|"
        before, after = report.losses
        lines.append(f"| {method} | {before:.3f} | {after:.3f} | {report.seconds:.0f} | {found} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


class Subject:
    """The adapted model, its batches, and the five passes of LoRA-GA over them."""

    def __init__(self, rank: int, count: int, checkpointing: bool) -> None:
        model, self.batches, layers = load(count)
        self.model, self.ranks = adapted(model, layers, rank), dict.fromkeys(layers, rank)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.adapter: Any = find_adapter(self.model)
        self.passes = GradientPasses(self.adapter, self.model, self.batches)
        self.weights: dict[str, Any] = {n: model.get_submodule(n).base_layer.weight for n in layers}
        self.shapes = {n: tuple(w.shape) for n, w in self.weights.items()}

    def fit(self, run: Callable[[Mapping[str, Asked]], dict[str, Tensor]]) -> None:
        method: Any = METHODS["lora-ga"]
        fit_leading(method, run, self.shapes, self.ranks, self.adapter.scalings(), EvaConfig(rho=1.0))

    def warm_up(self) -> None:
        """What is done once, and the weights' pages, which were not read before."""
        with torch.no_grad():
            self.model(**self.batches[0])

    def plain(self) -> None:
        for batch in self.batches:
            self.model(**batch).loss.backward()

    def listen(self) -> Any:
        """Have the frozen model's backward go all the way down."""
        embedding = self.model.get_base_model().get_input_embeddings()
        return embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def measure(side: str, rank: int, count: int, checkpointing: bool, *, tensors: bool) -> dict[str, Any]:
    """One side, in this process: seconds and what the process held, or what its tensors took."""
    subject = Subject(rank, count, checkpointing)
    seconds: list[float] = []

    def run(asked: Mapping[str, Asked]) -> dict[str, Tensor]:
        tick = time.process_time()
        products = subject.passes.run(asked).products
        seconds.append(time.process_time() - tick)
        return products

    def plain() -> None:
        for _ in range(1 if tensors else 5):  # each takes what the first does
            tick = time.process_time()
            subject.plain()
            seconds.append(time.process_time() - tick)

    def call() -> None:
        subject.fit(run) if side == "sketches" else plain()

    with subject.passes.frozen():
        if side == "frozen":
            subject.listen()
        for weight in subject.weights.values() if side == "formed" else ():
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        if tensors:
            return {"tensors": tensor_bytes(call)[0]}
        subject.warm_up()
        tick = time.process_time()
        peak = resident_peak(call, "cpu")
        whole = time.process_time() - tick
    gradients = 4 * sum(m * n for m, n in subject.shapes.values())
    return {"seconds": whole, "passes": seconds, "peak": peak, "gradients": gradients}


def turns(rank: int, count: int, checkpointing: bool) -> str:
    subject = Subject(rank, count, checkpointing)
    sketched: list[float] = []
    plain: list[float] = []
    left_out: list[float] = []

    def run(asked: Mapping[str, Asked]) -> dict[str, Tensor]:
        tick = time.process_time()
        products = subject.passes.run(asked).products
        sketched.append(time.process_time() - tick)
        handle = subject.listen()
        for seconds in (left_out, plain):
            tick = time.process_time()
            subject.plain()
            seconds.append(time.process_time() - tick)
        handle.remove()
        return products

    with subject.passes.frozen():
        subject.warm_up()
        tick = time.process_time()
        subject.fit(run)
        whole = time.process_time() - tick - sum(plain) - sum(left_out)
    one, other = (f"{min(of):.1f} to {max(of):.1f} s" for of in (sketched, plain))
    lines = [
        "| a pass | a plain one | five, and the algebra | five plain ones | of that |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines.append(f"| {one} | {other} | {whole:.1f} s | {sum(plain):.1f} s | {whole / sum(plain):.3f} |")
    return "\n".join(lines)


def in_a_process(side: str, rank: int, count: int, *flags: str) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "measure",
        "--side",
        side,
        "--rank",
        str(rank),
        "--batches",
        str(count),
        *flags,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cost(rank: int, count: int) -> str:
    lines = [
        "| | passes, seconds each | all, with the algebra | tensors | the process | the sketches' beyond it, of G |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for flags in ((), ("--checkpointing",)):
        found: dict[str, dict[str, Any]] = {}
        for side in reversed(SIDES):
            one = found[side] = in_a_process(side, rank, count, *flags)
            one |= in_a_process(side, rank, count, *flags, "--tensors")
            each = f"{min(one['passes']):.1f} to {max(one['passes']):.1f}"
            memories = " | ".join(f"{one[kind] / 2**20:.0f} MiB" for kind in ("tensors", "peak"))
            beyond = [(found["sketches"][kind] - one[kind]) / one["gradients"] for kind in ("tensors", "peak")]
            share = "" if side == "sketches" else f"{beyond[0]:.3f}, {beyond[1]:.3f}"
            lines.append(f"| {' '.join((side, *flags))} | {each} | {one['seconds']:.1f} s | {memories} | {share} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


#: A block's layers, (out, in): query and output, key and value, gate and up, down.
BLOCK = [*[(576, 576)] * 2, *[(192, 576)] * 2, *[(1536, 576)] * 2, (576, 1536)]
TOKENS, TURNS = 512, 40


def share_of(dtype: torch.dtype, columns: int) -> str:
    layers = []
    for m, n in BLOCK:
        x, delta, weight = (torch.randn(*shape).to(dtype) for shape in ((TOKENS, n), (TOKENS, m), (m, n)))
        sides = random_basis(n, columns), random_basis(m, columns), torch.zeros(m, columns), torch.zeros(n, columns)
        layers.append((x, delta, weight, *sides))

    def own() -> None:
        for x, delta, weight, *_ in layers:
            torch.nn.functional.linear(x, weight)
            torch.mm(delta, weight)

    def right() -> None:
        for x, delta, _, omega, _, product, _ in layers:
            outer_add_(product, delta, projected(x, omega))

    def left() -> None:
        for x, delta, _, _, psi, _, product in layers:
            outer_add_(product, x, projected(delta, psi))

    def copied() -> None:
        for _, delta, *_ in layers:
            delta.clone()

    seconds: dict[Any, list[float]] = {part: [] for part in (own, right, left, copied)}
    for _ in range(TURNS):
        for part, found in seconds.items():
            tick = time.process_time()
            part()
            found.append(time.process_time() - tick)
    least = {part: min(found[TURNS // 4 :]) for part, found in seconds.items()}
    sketch = (3 * least[right] + 2 * least[left]) / 5  # three of five passes are the one, two the other
    work = 4 * TOKENS * sum(m * n for m, n in BLOCK)
    few = 2 * TOKENS * columns * sum(m + n for m, n in BLOCK)
    saved = max(sketch - least[own] * few / work, 0) / (least[own] + sketch + least[copied])
    times = " | ".join(f"{1e3 * least[part]:.1f} ms" for part in (own, right, left, copied))
    rates = f"{work / least[own] / 1e9:.0f} | {few / sketch / 1e9:.0f}"
    return f"| {str(dtype)[6:]} | {times} | {(sketch + least[copied]) / least[own]:.3f} | {rates} | {saved:.3f} |"


def share(rank: int) -> str:
    lines = [
        "| | layers | x Ω, δᵀP | δ Ψ, xᵀ(δ Ψ) | copies | all over layers | GFLOP/s of layers | of the sketch | saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        lines.append(share_of(dtype, 5 * rank))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| passes | columns | kept of G | smallest cosine, worst | median | energy lost, worst |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cosines, kept, lost = torch.tensor(row["cosines"]), f"1/{1 / row['kept']:.1f}", f"{max(row['lost']):.1e}"
        found = f"{cosines.min():.4f} | {cosines.median():.4f} | {lost}"
        lines.append(f"| {row['passes']} | {row['columns']} r | {kept} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["schemes", "ranks", "starts", "turns", "cost", "share", "measure"])
    parser.add_argument("--every", type=int, default=1, help="of the layers, compare one in so many")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--batches", type=int, default=BATCHES)
    known = [name for name, row in METHODS.items() if isinstance(row, GradientMethod)]
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=SIDES, help="of measure")
    parser.add_argument("--checkpointing", action="store_true", help="of measure and turns")
    parser.add_argument("--tensors", action="store_true", help="of measure: the tensors' peak in place of seconds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.part == "measure":
        measured = measure(options.side, options.rank, options.batches, options.checkpointing, tensors=options.tensors)
        print(json.dumps(measured))
        return
    if options.part == "ranks":
        print(f"\n{ranks(options.every)}")
        return
    if options.part == "starts":
        print(f"\n{starts(options.rank, options.batches, options.methods, options.every)}")
        return
    if options.part == "share":
        print(f"\n{share(options.rank)}")
        return
    if options.part == "turns":
        print(f"\n{turns(options.rank, options.batches, options.checkpointing)}")
        return
    if options.part == "cost":
        print(f"\n{cost(options.rank, options.batches)}")
        return
    rows = schemes(options.every, options.rank)
    print(table(rows))
    if options.output:
        found = {"rank": options.rank, "every": options.every, "rows": rows, "versions": versions()}
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
