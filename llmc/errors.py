"""Errors for the user: one line with the problem, one line with the next step."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. The command line prints it without a traceback and exits with 2.

    problem: one sentence with the option or file, its value and the allowed values. hint: the next step, one sentence.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}\n{hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


class GateFailedError(UserError):
    """A candidate missed a ship/no-ship gate of `llmc compare`. Exit code 1."""

    exit_code = 1
