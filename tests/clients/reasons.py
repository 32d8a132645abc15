"""Tests of transformers that fail here, each with why it does not apply. What fails without a reason fails the gate."""

REASONS: dict[str, str] = {}
