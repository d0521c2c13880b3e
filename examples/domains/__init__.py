"""The paper's four domains: a model, its data and a shift for each, and LoRA from EVA beside LoRA from its default.

``python -m examples.domains.language_generation`` (from the repository's root) trains once from each;
``python -m benchmarks.evidence`` makes the comparison that the pages report.
"""
