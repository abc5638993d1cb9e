"""What each paper claims, as data: one file a paper, each with a function `claims(setting)`."""
