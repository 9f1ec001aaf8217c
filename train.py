"""Fine-tune a base on photos of a subject: `python train.py fit --config configs/train_full.yaml --data.instance_dir DIR ...`."""

from dreamblend.cli import entry  # first: it quiets the libraries as they are imported

from pathlib import Path

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from callbacks.snapshots import SnapshotCheckpoint
from dreamblend.files import check_writable


class TrainCLI(LightningCLI):
    def add_arguments_to_parser(self, parser) -> None:
        parser.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder of this run: snapshots, logs, previews and the resume state")
        parser.add_lightning_class_args(SnapshotCheckpoint, "snapshots")
        parser.link_arguments("out", "trainer.default_root_dir", compute_fn=str)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_fit(self) -> None:
        check_writable(Path(self.trainer.default_root_dir))
        self.datamodule.check()


@entry
def main() -> None:
    from dreamblend.data import SubjectData
    from dreamblend.tuner import Tuner

    TrainCLI(
        Tuner, SubjectData, seed_everything_default=0, save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},  # a continued run writes the same file again
        parser_kwargs={"fit": {"default_env": False}},
    )


if __name__ == "__main__":
    main()
