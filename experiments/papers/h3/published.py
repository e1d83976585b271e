"""What H3's paper publishes: accuracy on synthetic languages, perplexity on text."""

# All by way of a public review that quotes the tables.
# Table 2: accuracy in percent; of random guesses too.
RECALL = {
    "induction": {"guess": 5.0, "s4d": 35.6, "h3": 100.0, "attention": 100.0},
    "associative_recall": {"guess": 25.0, "s4d": 86.0, "h3": 99.8, "attention": 100.0},
}
# Table 3: perplexity on OpenWebText at 125M parameters.
PERPLEXITY = {"attention": 20.6, "s4d": 24.9, "h3": 21.0, "hybrid": 19.6}
