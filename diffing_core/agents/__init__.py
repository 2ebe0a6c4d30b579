"""Investigators: from findings alone, say what a finetune changed, or stay silent.

    findings -> offline.investigate -> calibration.decide -> hypothesis.tables
"""
