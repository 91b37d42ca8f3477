"""`ktops finetune`: its options and configuration files, the data, training, and what it reports."""
