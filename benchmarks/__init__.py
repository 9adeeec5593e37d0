"""What Gristmill costs, each figure beside something it can be compared with in the same run."""
