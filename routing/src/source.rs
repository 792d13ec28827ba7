//! Owns the paths by which routes and messages meet: pattern to path, message to path, match by prefix.

use thiserror::Error;

use crate::text;

/// Where a message comes from, as far as source patterns can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MessageSource<'a> {
    /// A leaf device.
    Device,
    /// A module of this or of a child's device.
    Module {
        /// Module id.
        module: &'a str,
        /// The output that it was sent to, if any.
        output: Option<&'a str>,
    },
    /// The hub's own notification of changed reported properties.
    TwinChange,
}

/// A message whose sender cannot be routed at all; the sender's publish fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MessageRejected {
    /// The module id is blank.
    #[error("the module id of the sender is blank; send with the id of a module")]
    BlankModule,
    /// The output name is blank.
    #[error("the output name of the message is blank; name an output or leave it out")]
    BlankOutput,
}

impl MessageSource<'_> {
    /// The path that patterns are compared with, for example `/messages/modules/press/outputs/alarms/`.
    ///
    /// # Errors
    /// The message is to be refused if an id that it needs is blank.
    pub fn path(&self) -> Result<String, MessageRejected> {
        let blank = |id: &str| id.trim().is_empty();
        let path = match *self {
            MessageSource::Device => return Ok("/messages/".to_owned()),
            MessageSource::TwinChange => return Ok("/twinChangeNotifications/".to_owned()),
            MessageSource::Module { module, .. } if blank(module) => {
                return Err(MessageRejected::BlankModule);
            }
            MessageSource::Module { module, output: None } => format!("/messages/modules/{module}"),
            MessageSource::Module { output: Some(output), .. } if blank(output) => {
                return Err(MessageRejected::BlankOutput);
            }
            MessageSource::Module { module, output: Some(output) } => {
                format!("/messages/modules/{module}/outputs/{output}")
            }
        };
        Ok(with_one_slash(path.trim()))
    }
}

/// A source pattern by itself, for tools: what a route's `FROM` may name, and what its grammar refuses, too.
///
/// ```
/// use edgehub_routing::SourcePattern;
///
/// let pattern = SourcePattern::new("/messages/modules/press/*");
/// assert_eq!(pattern.path(), "/messages/modules/press/");
/// assert!(pattern.covers("/Messages/Modules/Press/outputs/alarms/"));
/// assert!(!pattern.covers("/messages/modules/presses/"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePattern {
    path: String,
}

impl SourcePattern {
    /// The pattern of that text.
    pub fn new(pattern: &str) -> SourcePattern {
        SourcePattern { path: pattern_path(pattern) }
    }

    /// Its path, which ends in a slash.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Does it match messages from `path`, see [`MessageSource::path`]?
    pub fn covers(&self, path: &str) -> bool {
        FoldedPath::new(&self.path).covers(&FoldedPath::new(&with_one_slash(path.trim())))
    }
}

/// The path of a source pattern: wildcards and slashes at its end are removed, one slash is appended.
pub(crate) fn pattern_path(pattern: &str) -> String {
    with_one_slash(pattern.trim_end_matches('*'))
}

fn with_one_slash(path: &str) -> String {
    let mut path = path.trim_end_matches('/').to_owned();
    path.push('/');
    path
}

/// A path made ready for comparison: case folded away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FoldedPath(Box<str>);

impl FoldedPath {
    pub(crate) fn new(path: &str) -> FoldedPath {
        FoldedPath(text::folded(path).into())
    }

    /// Both end in a slash, so a prefix of characters is a prefix of whole segments.
    pub(crate) fn covers(&self, message: &FoldedPath) -> bool {
        message.0.starts_with(&*self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trailing_asterisks_are_wildcards() {
        for (pattern, path) in [
            ("/*", "/"),
            ("/***", "/"),
            ("/messages*", "/messages/"),
            ("/messages/**", "/messages/"),
            ("/messages/modules/*/outputs/*", "/messages/modules/*/outputs/"),
        ] {
            assert_eq!(pattern_path(pattern), path);
        }
    }

    #[test]
    fn blank_ids_are_refused() {
        let module = |module, output| MessageSource::Module { module, output }.path();
        assert_eq!(module(" ", None), Err(MessageRejected::BlankModule));
        assert_eq!(module("m", Some("")), Err(MessageRejected::BlankOutput));
        assert_eq!(module("m", Some("o//")).as_deref(), Ok("/messages/modules/m/outputs/o/"));
    }
}
