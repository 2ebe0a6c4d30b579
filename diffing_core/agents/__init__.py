"""Investigators: from findings alone, say what a finetune changed, or stay silent.

Data flow: offline.investigate(findings) -> calibration.decide(score) -> hypothesis.tables(both).
"""
