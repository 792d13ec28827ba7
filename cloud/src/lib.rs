//! A local stand-in for the cloud hub.
