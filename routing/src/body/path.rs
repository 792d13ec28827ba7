//! Owns the syntax of body paths: what is checked when a condition compiles, and what a path asks for at run time.

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// A member of an object.
    Member(String),
    /// An element of an array.
    Element(usize),
    /// All members of an object.
    AnyMember,
    /// All elements of an array.
    AnyElement,
    /// All members of that name at any depth.
    MemberBelow(String),
    /// All values at any depth.
    AnyBelow,
}

/// A path that compiles.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BodyPath {
    /// None: it cannot be followed, and its value is always undefined.
    steps: Option<Vec<Step>>,
}

impl BodyPath {
    /// Checks the text behind `$body.`, and reads it in the way in which it will be followed.
    pub(crate) fn parse(path: &str) -> Result<BodyPath, &'static str> {
        check(path)?;
        Ok(BodyPath { steps: Reader::new(path).steps() })
    }

    /// What to do from the root; none if the value is undefined whatever the body is.
    pub(crate) fn steps(&self) -> Option<&[Step]> {
        self.steps.as_deref()
    }
}

/// Does a path begin as the grammar of paths demands? What follows a second index or a stray bracket is not looked at.
fn check(path: &str) -> Result<(), &'static str> {
    let mut rest = path;
    loop {
        let width = rest.find(['.', '[', ']']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(width);
        if name.is_empty() {
            return Err("a member of the body path has no name");
        }
        if name.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("a member of the body path cannot be a number");
        }
        let (index, after) = match after.strip_prefix('[') {
            None => (false, after),
            Some(inner) => {
                let digits = inner.bytes().take_while(u8::is_ascii_digit).count();
                match inner.get(digits..).and_then(|tail| tail.strip_prefix(']')) {
                    Some(after) if digits > 0 => (true, after),
                    _ => return Err("an index of the body path must be a number in brackets"),
                }
            }
        };
        match after.chars().next() {
            None => return Ok(()),
            Some('.') => rest = after.get(1..).unwrap_or_default(),
            Some(']') if !index => return Ok(()),
            Some(_) if index => return Ok(()),
            Some(_) => return Err("the body path cannot go on like this"),
        }
    }
}

/// Reads the path again, whole; gives up where it cannot be followed.
struct Reader<'p> {
    rest: &'p str,
    steps: Vec<Step>,
    /// The next step searches at any depth.
    below: bool,
}

impl<'p> Reader<'p> {
    fn new(path: &'p str) -> Reader<'p> {
        Reader { rest: path, steps: Vec::new(), below: false }
    }

    fn steps(mut self) -> Option<Vec<Step>> {
        match self.rest.strip_prefix('$') {
            Some("") => return Some(self.steps),
            Some(after) if after.starts_with(['.', '[']) => self.rest = after,
            _ => {}
        }
        let mut after_index = false;
        let mut after_dot = false;
        while !self.rest.is_empty() {
            let width = self.rest.find(['.', '[', ']']).unwrap_or(self.rest.len());
            let (name, rest) = self.rest.split_at(width);
            if !name.is_empty() {
                if after_index {
                    return None;
                }
                self.member(name);
                after_dot = false;
            }
            self.rest = rest;
            if let Some(inner) = rest.strip_prefix('[') {
                self.index(inner)?;
                (after_index, after_dot) = (true, false);
            } else if let Some(rest) = rest.strip_prefix('.') {
                self.below |= rest.starts_with('.');
                self.rest = rest.strip_prefix('.').unwrap_or(rest);
                (after_index, after_dot) = (false, true);
            } else if !rest.is_empty() {
                return None;
            }
        }
        (!after_dot).then_some(self.steps)
    }

    fn member(&mut self, name: &str) {
        let below = std::mem::take(&mut self.below);
        self.steps.push(match (name, below) {
            ("*", false) => Step::AnyMember,
            ("*", true) => Step::AnyBelow,
            (name, false) => Step::Member(name.to_owned()),
            (name, true) => Step::MemberBelow(name.to_owned()),
        });
    }

    fn index(&mut self, inner: &'p str) -> Option<()> {
        if let Some(quoted) = inner.strip_prefix('\'') {
            let (name, rest) = quoted.split_once('\'')?;
            self.rest = rest.strip_prefix(']')?;
            let below = std::mem::take(&mut self.below);
            let name = name.to_owned();
            self.steps.push(if below { Step::MemberBelow(name) } else { Step::Member(name) });
            return Some(());
        }
        let (index, rest) = inner.split_once(']')?;
        self.rest = rest;
        self.below = false;
        self.steps.push(match index {
            "*" => Step::AnyElement,
            _ if index.is_empty() || !index.bytes().all(|byte| byte.is_ascii_digit()) => return None,
            digits => {
                Step::Element(digits.parse::<i32>().ok().and_then(|index| usize::try_from(index).ok())?)
            }
        });
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_paths_are_refused() {
        for path in
            ["", ".a", "a..b", "a.", "7", "a.7", "a[", "a[]", "a[b]", "a['b']", "a[-1]", "a[*]", "a[1", "[0]"]
        {
            assert!(BodyPath::parse(path).is_err(), "{path}");
        }
        for path in ["0x", "1a", "a-b", "é", "it's", "*", "$v", "a[0][", "a]b[", "a[0]]"] {
            assert!(BodyPath::parse(path).is_ok(), "{path}");
        }
    }

    #[test]
    fn paths_are_read_whole() {
        let steps = |path: &str| BodyPath::parse(path).expect("compiles").steps;
        let member = |name: &str| Step::Member(name.to_owned());
        assert_eq!(steps("a.b[007].c"), Some(vec![member("a"), member("b"), Step::Element(7), member("c")]));
        assert_eq!(steps("$.a"), Some(vec![member("a")]));
        assert_eq!(steps("$m"), Some(vec![member("$m")]));
        assert_eq!(
            steps("a[0]['k'][*]"),
            Some(vec![member("a"), Step::Element(0), member("k"), Step::AnyElement])
        );
        let below = Step::MemberBelow("z".to_owned());
        assert_eq!(steps("a[0][0]..z"), Some(vec![member("a"), Step::Element(0), Step::Element(0), below]));
        for undefined in ["a]", "a[0]x", "a[99999999999]", "a[0][", "a[0][0]."] {
            assert_eq!(steps(undefined), None, "{undefined}");
        }
    }
}
