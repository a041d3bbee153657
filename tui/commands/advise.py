"""`gpumem-tui advise`: which techniques save most at the peak."""
import argparse
def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
