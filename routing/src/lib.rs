//! The edgehub route language.
