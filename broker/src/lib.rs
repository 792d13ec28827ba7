//! The edgehub message hub as a library.
