"""Reports beside training runs, with the trainers and trackers themselves."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from eva_lora.integrations.trackers import log_tensorboard, log_wandb, scalars
from eva_lora.integrations.transformers import EvaReportCallback
from support.bounds import UNIT_ROUNDOFF
from support.models import lora, tiny_llama


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return loaded.Reload()


def train(callback, folder, **options):
    ids = torch.arange(20)
    data = [{"input_ids": ids, "labels": ids}] * 2
    arguments = TrainingArguments(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True, **options)
    Trainer(lora(tiny_llama()), arguments, train_dataset=data, callbacks=[callback]).train()


def test_a_trainer_leaves_the_report_beside_its_run(report, tmp_path):
    train(EvaReportCallback(report, plots=["svg"]), tmp_path, report_to="none", save_strategy="no")
    stored = json.loads((tmp_path / "eva_report" / "report.json").read_text())
    assert stored["ranks"] == report.ranks
    assert (tmp_path / "eva_report" / "report.html").is_file()
    assert (tmp_path / "eva_report" / "ranks.svg").is_file()
    assert not (tmp_path / "runs").exists()


def test_a_trainer_that_reports_to_tensorboard_shows_the_report_there(report, tmp_path):
    pytest.importorskip("tensorboard")
    train(EvaReportCallback(report), tmp_path, report_to="tensorboard", save_strategy="no")
    written = events(tmp_path / "runs" / "eva")
    assert written.Scalars("eva/budget")[0].value == 84
    assert [event.value for event in written.Scalars("eva/layers_converged_by_batch")] == report.history
    assert {f"eva/plots/{name}" for name in ("ranks", "spectra", "convergence", "budget")} <= set(
        written.Tags()["images"]
    )


def test_other_ranks_write_nothing(report, tmp_path):
    class Elsewhere:
        is_world_process_zero = False

    EvaReportCallback(report).on_train_begin(TrainingArguments(str(tmp_path / "run")), Elsewhere(), None)
    assert not (tmp_path / "run" / "eva_report").exists()


def test_totals_add_up(report):
    totals = scalars(report)
    assert totals["layers"] == 21
    assert totals["layers_converged"] == sum(report.converged.values())
    assert totals["seconds_total"] == report.seconds["total"]
    assert totals["captured_variance_min"] == min(report.captured(name) for name in report.ranks)


def test_tensorboard_takes_the_report(report, tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        log_tensorboard(report, writer, step=7)
    written = events(tmp_path)
    for name, value in scalars(report).items():
        [event] = written.Scalars(f"eva/{name}")
        assert (event.step, event.value) == (7, pytest.approx(value, rel=UNIT_ROUNDOFF[torch.float32]))


def test_lightning_leaves_the_report_beside_its_run(report, tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    pytest.importorskip("tensorboard")
    from eva_lora.integrations.lightning import EvaReportCallback as LightningCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def training_step(self, batch, _):
            return self.linear(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[LightningCallback(report)],
        logger=loggers.TensorBoardLogger(str(tmp_path), name="run"),
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    folder = tmp_path / "run" / "version_0"
    assert json.loads((folder / "eva_report" / "report.json").read_text())["ranks"] == report.ranks
    assert events(folder).Scalars("eva/layers")[0].value == 21


@pytest.mark.slow
def test_wandb_takes_the_report(report, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="eva") as run:
        log_wandb(report, run)
        assert run.summary["eva/budget"] == 84
        assert run.summary["eva/layers_converged"] == sum(report.converged.values())
    [page] = tmp_path.rglob("report_*.html")
    assert "EVA report" in page.read_text()
    assert len(list(tmp_path.rglob("*.png"))) == 4
