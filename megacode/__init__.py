"""megacode: the trainer for code language models of the Code Llama family."""

__version__ = "0.1.0"
