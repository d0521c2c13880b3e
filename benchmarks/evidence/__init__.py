"""What EVA buys: fine-tuning from EVA and from other initialisations, the same budget, learning rates tuned for each."""
