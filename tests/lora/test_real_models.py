"""EVA on MiniLM and SmolLM2 with real text, against exact covariances and against PEFT."""

import warnings

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.incremental_pca import IncrementalPCA
from sklearn.decomposition import PCA

from eva_lora import EvaConfig, eva_initialize
from eva_lora.cli.demo import load_smollm2, packed_text
from support.bounds import EXACT_CAPTURES, deviation, orthonormality, product_rounding
from support.models import captured_share, layer_inputs, load_minilm, lora_a_of, scatter
from support.versions import needs

ENCODER_LINEARS = r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|.*\.dense)"


def minilm_lora(base, **options):
    defaults = {"r": 8, "target_modules": ENCODER_LINEARS, "init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
    return get_peft_model(base, LoraConfig(**{**defaults, **options}))


def bounded(**options):
    return EvaConfig(max_batches=5, **options)


@pytest.fixture(scope="module")
def bert(minilm_batches):
    """Exact statistic on blocks of MiniLM: the model, its report, and the scatter of the same rows in float64."""
    model = minilm_lora(load_minilm(), target_modules=ENCODER_LINEARS.replace(r"\d+", "[035]"))
    rows = layer_inputs(model, minilm_batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = eva_initialize(model, minilm_batches, bounded(statistic="gram", equal_data=True), progress=False)
    return model, report, {name: scatter(x) for name, x in rows.items()}, rows


def test_exact_statistic_captures_the_optimum_on_every_layer(bert):
    model, _, exact, _ = bert
    shares = {name: captured_share(a, exact[name]) for name, a in lora_a_of(model).items()}
    assert len(shares) == 18
    assert min(shares.values()) >= EXACT_CAPTURES


def test_exact_statistic_equals_pca_of_the_same_rows(bert):
    model, report, _, rows = bert
    for name in ("encoder.layer.0.attention.self.query", "encoder.layer.3.intermediate.dense"):
        a = lora_a_of(model)[name].double()
        pca = PCA(a.shape[0] + 1, svd_solver="full").fit(rows[name].numpy())
        gaps = -np.diff(pca.explained_variance_) / pca.explained_variance_[0]
        gaps = np.minimum(gaps, np.r_[np.inf, gaps[:-1]])
        x = (rows[name] - rows[name].mean(0)).float()
        plain = torch.linalg.eigh((x.T @ x).double())[1].flip(1)[:, : len(a)].T
        missed, allowed = (1 - np.abs(np.sum(v.numpy() * pca.components_[:-1], axis=1)) for v in (a, plain))
        # An eigenvector turns by an angle in proportion to ‖C − C'‖ / gap: by twice as much as with plain products.
        assert (missed <= 4 * (allowed * gaps**2).max() / gaps**2 + orthonormality(a.shape[1], len(a))).all()
        rounding = product_rounding("reference", *x.shape)
        ratios = report.explained_variance_ratio[name][: len(a)]
        np.testing.assert_allclose(ratios, pca.explained_variance_ratio_[:-1], rtol=0, atol=rounding)


def test_rows_are_orthonormal_and_signed(bert):
    model, *_ = bert
    for a in lora_a_of(model).values():
        assert deviation(a.T).abs().max() <= orthonormality(a.shape[1], len(a))
        largest = a.abs().argmax(1, keepdim=True)
        assert (a.gather(1, largest) > 0).all()


def test_one_statistic_per_distinct_input(bert):
    _, report, *_ = bert
    assert sorted(len(names) for names in report.shared_inputs) == [3] * 3
    for names in report.shared_inputs:
        assert {name.rpartition(".")[2] for name in names} == {"query", "key", "value"}


@pytest.mark.slow  # on toy models: tests/lora/test_sites.py
def test_sharing_off_gives_the_same_answer(minilm, minilm_batches, bert):
    expected, report, *_ = bert
    model = minilm_lora(minilm, target_modules=expected.peft_config["default"].target_modules)
    with pytest.warns(UserWarning, match="not converged"):
        own = eva_initialize(
            model, minilm_batches, bounded(statistic="gram", equal_data=True, share_inputs=False), progress=False
        )
    assert own.shared_inputs == []
    assert own.ranks == report.ranks
    for name, a in lora_a_of(model).items():
        assert torch.equal(a, lora_a_of(expected)[name])


def test_captures_at_least_what_peft_captures(minilm, minilm_batches, bert):
    """Both are given the same batches: PEFT goes over them until it is done, ours once."""
    exact = bert[2]
    options = {
        "target_modules": r".*encoder\.layer\.3\.(attention\.self\.(query|key|value)|.*dense)",
        "eva_config": peft.EvaConfig(rho=1.0),
    }
    model = minilm_lora(minilm, **options)
    theirs = peft.get_eva_state_dict(model, minilm_batches, show_progress_bar=False)
    losses = [[1 - captured_share(a, exact[name.removeprefix("base_model.model.")]) for name, a in theirs.items()]]
    for statistic in ("gram", "subspace"):
        model = minilm_lora(load_minilm(), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eva_initialize(model, minilm_batches, bounded(statistic=statistic, rho=1.0), progress=False)
        losses.append(
            [
                1
                - captured_share(
                    lora_a_of(model)[name.removeprefix("base_model.model.")],
                    exact[name.removeprefix("base_model.model.")],
                )
                for name in theirs
            ]
        )
    peft_losses, gram, subspace = np.array(losses)
    assert len(peft_losses) == 6
    assert gram.max() <= 1 - EXACT_CAPTURES
    assert (gram <= peft_losses).all()  # which has lost what it cut off
    assert subspace.mean() <= peft_losses.mean()


@pytest.mark.parametrize("rho", [1.0, *(pytest.param(rho, marks=pytest.mark.slow) for rho in (1.2, 2.0)), 3.0])
def test_ranks_sum_to_the_budget(minilm, minilm_batches, rho):
    model = minilm_lora(minilm, rank_pattern={r"layer\.2\..*": 12})
    configured = {name: a.shape[0] for name, a in lora_a_of(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = eva_initialize(model, minilm_batches, EvaConfig(rho=rho, max_batches=3), progress=False)
    assert sum(report.ranks.values()) == sum(configured.values()) == 36 * 8 + 6 * 4
    assert all(rank <= round(configured[name] * rho) for name, rank in report.ranks.items())
    assert {n: a.shape[0] for n, a in lora_a_of(model).items()} == {n: r for n, r in report.ranks.items() if r}
    if rho == 1.0:
        assert report.ranks == configured


@pytest.fixture(scope="module")
def smollm2():
    base, tokenizer = load_smollm2()
    return base, packed_text(tokenizer, sequences=2, tokens=128)


@pytest.mark.slow  # `make demo-short` has this model, too
@needs("transformers>=5")  # which saved the model that environments share
def test_smollm2_end_to_end(smollm2, tmp_path):
    base, batches = smollm2
    sample = batches[-1]["input_ids"]
    with torch.no_grad():
        expected = base.eval()(input_ids=sample).logits
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights="eva"))
    rows = layer_inputs(model, batches[:5])
    with pytest.warns(UserWarning, match="layers not converged"):
        report = eva_initialize(model, batches, EvaConfig(max_batches=5, equal_data=True), progress=False)
    assert sum(report.ranks.values()) == 210 * 8
    assert report.num_rows == 5 * 256
    assert {state["kind"] for state in report.statistic.values()} == {"subspace"}  # 24 columns for 576 and 1536
    shares = {n: captured_share(a, scatter(rows[n])) for n, a in lora_a_of(model).items() if ".1." in n or ".17." in n}
    assert len(shares) == 14
    theirs = []
    for name in shares:
        pca = IncrementalPCA(n_components=16)  # twice the rank, as PEFT takes
        for batch in rows[name].float().chunk(5):
            pca.partial_fit(batch)
        theirs.append(captured_share(pca.components_[: report.ranks[name]], scatter(rows[name])))
    assert np.mean(list(shares.values())) >= np.mean(theirs)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=sample).logits, expected)
    model.save_pretrained(tmp_path)
    fresh, _ = load_smollm2()
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    ours, theirs = peft.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(reloaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
