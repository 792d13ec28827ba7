//! Twins: what a device or module is told to be, what it says it is, and how both change.
//!
//! | room | owns |
//! | --- | --- |
//! | [`json`] | documents and patches: merge, difference, limits |

pub mod json;
