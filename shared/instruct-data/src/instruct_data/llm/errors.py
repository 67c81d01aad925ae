"""Why a run of requests ends before its work is done. What was answered is in the journal; the same command goes on."""

from __future__ import annotations


class Stopped(RuntimeError):
    """No further request is sent."""

    exit_code = 1


class Interrupted(Stopped):
    """The user pressed Ctrl-C; `stream` makes it a KeyboardInterrupt, which no task may raise."""


class BudgetReached(Stopped):
    """The user's limit of cost, tokens or requests is reached."""

    exit_code = 4


class ServiceFailed(Stopped):
    """The service refuses everybody (a wrong key, no quota left), or has failed too often in a row."""

    exit_code = 5
