"""Trainings that are interrupted on purpose."""

from robustnb import training


def stop_at(monkeypatch, step: int) -> None:
    "The step of this number is interrupted, the first time."
    take, left = training._Trainer.__call__, [step]

    def impatient(self, *args):
        if self.step == step and left:
            left.clear()
            raise KeyboardInterrupt
        return take(self, *args)

    monkeypatch.setattr(training._Trainer, '__call__', impatient)
