"""`peer doctor`: what this machine and its line can do, measured with the help of other peers."""
