"""Where the host keeps its arguments."""

from argparse import Namespace

args = Namespace()
