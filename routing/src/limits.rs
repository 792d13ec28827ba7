//! Owns the limits of the language; the reference has none, and ends by stack overflow.

/// Routes in one table.
pub const ROUTES_MAX: usize = 1024;

/// Bytes of one route text.
pub const ROUTE_BYTES_MAX: usize = 64 * 1024;

/// Open parentheses and prefix operators around one operand.
pub const EXPRESSION_DEPTH_MAX: usize = 256;

/// Objects and arrays around one value of a body, the outermost counted.
pub const BODY_DEPTH_MAX: usize = 64;
