"""Uses of a trained model: generating, evaluating, classifying and explaining."""
