#!/usr/bin/env python3
"""The original script's name: the same program as the console script `bert-evaluation`."""

from bert_evaluation.cli import main

if __name__ == "__main__":
    main()
