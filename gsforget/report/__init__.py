"""The evidence of a run as one self-contained page, `report.html`: for people who cannot code first, details later."""

from gsforget.report.history import read_history
from gsforget.report.page import write_report
from gsforget.report.pictures import Example

__all__ = ["Example", "read_history", "write_report"]
