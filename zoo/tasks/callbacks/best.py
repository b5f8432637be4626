"""checkpoints/best.ckpt: of the epoch that validation chose, also after the run's folder was moved."""

import os
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps one file of the best epoch.

    Lightning forgets which score that had where the folder is named by another path than before, as it is from another
    working directory or after it was moved, and then replaces it by the next epoch, however bad.

    Args:
        monitor: the logged value.
        mode: "max" or "min".
        dirpath: where; the run folder's `checkpoints` when absent.
    """

    def __init__(self, monitor: str, mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(dirpath, "best", monitor, mode=mode, enable_version_counter=False)

    @property
    def state_key(self) -> str:
        # Runs before this class kept theirs under this name.
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("dirpath")
        if before and self.dirpath and before != self.dirpath:

            def here(path: str) -> str:
                return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

            state_dict = state_dict | {"dirpath": self.dirpath}
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state_dict[name] = here(state_dict.get(name, ""))
            kept = state_dict.get("best_k_models", {})
            state_dict["best_k_models"] = {here(path): score for path, score in kept.items()}
        super().load_state_dict(state_dict)
