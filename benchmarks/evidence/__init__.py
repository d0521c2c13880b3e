"""What EVA buys: fine-tuning from EVA and from other initialisations, one budget, a learning rate for each."""
