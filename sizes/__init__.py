"""What people and models write becomes sizes in centimetres: numbers with units, labels, answers, texts."""
