"""Mixtures of experts: a statistic for each expert, and what experts with too few rows take."""

import re

import peft
import pytest
import torch
from torch import nn

from eva_lora import EvaConfig, EvaPlan, EvaReport, EvaStatistics, apply, collect, eva_initialize, plan
from support.bounds import EXACT_CAPTURES, deviation, orthonormality
from support.kinds import call
from support.models import captured_share, lora_a_of, scatter, token_batches
from support.peft_kinds import EXPERTS, STACKED_EXPERTS, gpt_oss, mixtral
from support.versions import needs

pytestmark = [pytest.mark.filterwarnings("ignore:EVA stopped at"), needs(STACKED_EXPERTS)]

RANK = 4


def adapted(base, rank=RANK):
    config = peft.LoraConfig(r=rank, target_modules=[], target_parameters=EXPERTS)
    return peft.get_peft_model(base, config)


def shunning(*experts):
    """GPT-OSS with experts that no token is sent to."""
    base = gpt_oss()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("router.bias"):
                parameter[list(experts)] = -1e4
    return base


def routed(base, batches, keep=lambda batch: None):
    """Rows that each expert of the first block is sent, token by token."""
    experts = next(m for m in base.modules() if type(m).__name__.endswith("Experts"))
    rows: list[list[torch.Tensor]] = [[] for _ in range(experts.num_experts)]
    calls = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    base.eval()
    with torch.no_grad():
        for batch in batches:
            call(base, batch)
            hidden, chosen = calls.pop()[:2]
            mask = keep(batch)
            kept = torch.ones(len(hidden), dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
            for token in kept.nonzero().flatten().tolist():
                for expert in chosen[token].tolist():
                    rows[expert].append(hidden[token].double())
    handle.remove()
    return rows


def first_gate_up(model):
    layer = next(m for m in model.modules() if getattr(m, "parameter_name", "") == "gate_up_proj")
    return layer.lora_A["default"].weight.detach().chunk(layer.num_experts)


def test_counts_are_those_of_each_expert():
    batches = token_batches(3)
    report = eva_initialize(adapted(mixtral()), batches, EvaConfig(max_batches=3), progress=False)
    rows = routed(mixtral(), batches)
    for parameter in ("gate_up_proj", "down_proj"):
        assert report.statistic[f"model.layers.0.mlp.experts.{parameter}"]["expert_rows"] == [len(r) for r in rows]
    assert not report.notes


def test_padding_is_routed_nowhere():
    batches = token_batches(3)
    for batch in batches:
        batch["attention_mask"] = (torch.arange(24) < torch.tensor([24, 9, 15, 20])[:, None]).long()
    model = adapted(mixtral())
    report = eva_initialize(model, batches, EvaConfig(max_batches=3), progress=False)
    rows = routed(mixtral(), batches, lambda batch: batch["attention_mask"])
    assert report.statistic["model.layers.0.mlp.experts.gate_up_proj"]["expert_rows"] == [len(r) for r in rows]
    for a, mine in zip(first_gate_up(model), rows, strict=True):
        assert captured_share(a, scatter(torch.stack(mine))) >= EXACT_CAPTURES


def test_an_expert_without_rows_takes_the_leading_directions_of_all(tmp_path):
    batches = token_batches(4)
    model = adapted(shunning(1))
    report = eva_initialize(model, batches, EvaConfig(max_batches=4), progress=False)
    gate_up = "model.layers.0.mlp.experts.gate_up_proj"
    assert report.statistic[gate_up]["expert_rows"][1] == 0
    assert sum(gate_up in note for note in report.notes) == 1
    note = next(note for note in report.notes if gate_up in note)
    assert re.search(
        r"of 4 experts saw too few rows for its rank of \d+ and take .* all together: .*1 \(0 rows\)", note
    )
    assert "1 (0 rows)" in str(report)
    pooled = sum(scatter(torch.stack(r)) for r in routed(shunning(1), batches) if r)
    assert captured_share(first_gate_up(model)[1], pooled) >= EXACT_CAPTURES  # of what each expert keeps
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(shunning(1), tmp_path)
    for ours, theirs in zip(first_gate_up(model), first_gate_up(reloaded), strict=True):
        assert torch.equal(ours, theirs)


def test_too_few_rows_of_all_experts_are_completed_at_random():
    one_token = [{"input_ids": torch.tensor([[5]])}]
    statistics = collect(adapted(mixtral()), one_token, EvaConfig(max_batches=1), progress=False)
    eva_plan = plan(statistics)
    assert any("are random" in note for note in eva_plan.notes)
    for stacked in eva_plan.lora_a.values():
        for a in stacked.chunk(4):
            assert deviation(a.T).abs().max() <= orthonormality(a.shape[1], len(a))
    again = plan(statistics)
    assert all(torch.equal(a, again.lora_a[name]) for name, a in eva_plan.lora_a.items())


def test_statistics_and_plans_of_experts_save_and_load(tmp_path):
    model = adapted(shunning(0))
    statistics = collect(model, token_batches(3), EvaConfig(max_batches=3), progress=False)
    eva_plan = plan(EvaStatistics.load(statistics.save(tmp_path / "statistics")), budget=11)
    loaded = EvaPlan.load(eva_plan.save(tmp_path / "plan"))
    assert loaded.notes == eva_plan.notes
    assert loaded.notes
    apply(model, loaded)
    layer = first_gate_up(model)
    assert layer[0].shape[0] == eva_plan.ranks["model.layers.0.mlp.experts.gate_up_proj"]


class Routed(nn.Module):
    """Experts as layers of their own: ``route`` says which of them a batch reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, route):
        return sum(self.experts[i](torch.tanh(self.inner(x))) for i in route)


def routed_model():
    names = ["inner", "experts.0", "experts.1", "experts.2"]
    return peft.get_peft_model(Routed(), peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))


def routes(*lists):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(30, 8, generator=generator), "route": route} for route in lists]


def test_layers_that_the_first_batch_misses_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"2 LoRA layers saw no input in the first batch: experts\.1, experts\.2\..*"):
        eva_initialize(routed_model(), routes([0], [1, 2]), overwrite=True, progress=False)


def test_layers_that_are_never_called_keep_rank_and_a_where_that_is_allowed(tmp_path):
    model = routed_model()
    before = {name: a.clone() for name, a in lora_a_of(model).items()}
    data = routes([0], [0, 1], [0, 1], [1])
    config = EvaConfig(max_batches=8, uncalled="default", tau=1.0)
    statistics = collect(model, data, config, progress=False)
    eva_plan = plan(EvaStatistics.load(statistics.save(tmp_path / "s")), budget=6)
    apply(model, EvaPlan.load(eva_plan.save(tmp_path / "p")), overwrite=True)
    after = lora_a_of(model)
    assert torch.equal(after["experts.2"], before["experts.2"])
    assert eva_plan.ranks["experts.2"] == 2
    assert sum(eva_plan.ranks.values()) == 6
    assert eva_plan.notes == ("experts.2 saw no input: it keeps its rank and its initial A",)
    report = EvaReport.of(statistics, eva_plan)
    assert report.statistic["experts.2"] == {}
    assert eva_plan.notes[0] in (report.save(tmp_path / "report") / "report.html").read_text("utf-8")
    assert eva_plan.notes[0] in str(report)
    base, rows = Routed(), []
    handle = base.experts[1].register_forward_pre_hook(lambda _, args: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in data * 2:
            base(**batch)
        handle.remove()
        for route in ([0], [2], [0, 1, 2]):  # B is zero everywhere, so the outputs are the base's
            x = {"x": data[0]["x"], "route": route}
            assert torch.equal(model.eval()(**x), base(**x))
    if eva_plan.ranks["experts.1"]:
        assert captured_share(after["experts.1"], scatter(torch.cat(rows))) >= EXACT_CAPTURES


def test_a_layer_called_late_is_waited_for():
    late = routes([0], [0], [0, 1, 2], [1, 2], [1, 2])
    config = EvaConfig(max_batches=10, uncalled="default", tau=0.0)
    model = routed_model()
    report = eva_initialize(model, late, config, overwrite=True, progress=False)
    assert report.num_batches == 2  # tau = 0: two refreshes of those that were called are enough
    assert {name for name, done in report.converged.items() if done} == {"inner", "experts.0"}
    full = eva_initialize(routed_model(), late[2:], config, overwrite=True, progress=False)
    assert all(full.converged.values())


def test_a_budget_that_layers_without_input_eat_up_is_refused():
    statistics = collect(routed_model(), routes([0], [0]), EvaConfig(max_batches=2, uncalled="default"), progress=False)
    with pytest.raises(ValueError, match=r"^budget: expected more than the 4 that layers without input keep, got 4"):
        plan(statistics, budget=4)


def test_a_layer_that_keeps_its_a_under_dora_still_computes_its_base():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, both=False):
            return self.used(x) + (self.spare(x) if both else 0)

    config = peft.LoraConfig(r=2, target_modules=["used", "spare"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(Wide(), config)
    before = lora_a_of(model)["spare"].clone()
    data = [{"x": torch.randn(20, 8)} for _ in range(2)]
    eva_initialize(model, data, EvaConfig(max_batches=2, uncalled="default"), overwrite=True, progress=False)
    assert torch.equal(lora_a_of(model)["spare"], before)
    with torch.no_grad():
        assert torch.equal(model(data[0]["x"], both=True), Wide()(data[0]["x"], both=True))


def test_a_layer_with_fewer_rows_than_its_rank_is_completed_and_named():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=5, target_modules=["0"]))
    rows = torch.randn(3, 8)
    report = eva_initialize(model, [rows], EvaConfig(max_batches=1, rho=1.0), progress=False)
    assert report.notes == ("0 saw only 3 rows for its rank of 5: 3 of its rows are random",)
    a = lora_a_of(model)["0"]
    assert deviation(a.T).abs().max() <= orthonormality(8, 5)
    assert captured_share(a, scatter(rows.double())) >= EXACT_CAPTURES


def test_a_model_none_of_whose_layers_is_called_is_an_error():
    model = peft.get_peft_model(Routed(), peft.LoraConfig(r=2, target_modules=["experts.2"]))
    data = [{**batch, "attention_mask": torch.ones(30, 1)} for batch in routes([0], [1])]

    def forward(model, batch):
        return model(x=batch["x"], route=batch["route"])

    config = EvaConfig(max_batches=2, uncalled="default")
    with pytest.raises(ValueError, match=r"^model: none of its 1 LoRA layers saw an unmasked row: \['experts\.2'\]"):
        eva_initialize(model, data, config, forward_fn=forward, progress=False)
