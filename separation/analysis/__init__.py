"""What a song is like: its tempo, its key and how loud it is."""
