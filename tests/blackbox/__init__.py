"""The built program, its surroundings, and the eyes of the tests: everything is a real process or socket."""
