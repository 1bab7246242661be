"""What would end or spoil a training, found before it starts: every image and annotation of a config's data sets."""
