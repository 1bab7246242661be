"""The end of set-up, for error messages."""

from mmengine.hooks import Hook
from mmengine.runner import Runner


class SetupEndHook(Hook):
    """Records that set-up is over; an unknown error after that is a bug and keeps its traceback."""

    priority = 'LOWEST'
    finished = False

    def before_train(self, runner: Runner) -> None:
        """End of set-up for training."""
        self.finished = True

    def before_test(self, runner: Runner) -> None:
        """End of set-up for testing."""
        self.finished = True
