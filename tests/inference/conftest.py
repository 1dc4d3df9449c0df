"""Nothing here times anything: programs are compiled quickly, and are those of tests/hf."""

from tests.hf.conftest import quick_compilation

__all__ = ("quick_compilation",)
