//! Owns the functions of the language: names, arguments, results.

use crate::check::Type;
use crate::text::equal_names;

/// A function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Function {
    Abs,
    Ceiling,
    Floor,
    Exp,
    Power,
    Sign,
    Sqrt,
    Square,
    AsNumber,
    IsBool,
    IsDefined,
    IsNull,
    IsNumber,
    IsString,
    Concat,
    Length,
    Lower,
    Upper,
    Substring,
    IndexOf,
    StartsWith,
    EndsWith,
    Contains,
}

const FUNCTIONS: [(&str, Function); 23] = [
    ("abs", Function::Abs),
    ("ceiling", Function::Ceiling),
    ("floor", Function::Floor),
    ("exp", Function::Exp),
    ("power", Function::Power),
    ("sign", Function::Sign),
    ("sqrt", Function::Sqrt),
    ("square", Function::Square),
    ("as_number", Function::AsNumber),
    ("is_bool", Function::IsBool),
    ("is_defined", Function::IsDefined),
    ("is_null", Function::IsNull),
    ("is_number", Function::IsNumber),
    ("is_string", Function::IsString),
    ("concat", Function::Concat),
    ("length", Function::Length),
    ("lower", Function::Lower),
    ("upper", Function::Upper),
    ("substring", Function::Substring),
    ("index_of", Function::IndexOf),
    ("starts_with", Function::StartsWith),
    ("ends_with", Function::EndsWith),
    ("contains", Function::Contains),
];

impl Function {
    /// The function of that name, in any case.
    pub(crate) fn of_name(name: &str) -> Option<Function> {
        FUNCTIONS.iter().find(|(known, _)| equal_names(known, name)).map(|(_, function)| *function)
    }

    /// All names.
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        FUNCTIONS.iter().map(|(name, _)| *name)
    }

    /// The name, as the documentation spells it.
    pub(crate) fn name(self) -> &'static str {
        FUNCTIONS.iter().find(|(_, known)| *known == self).map_or("", |(name, _)| name)
    }

    /// The type of the result; none if the function does not take such arguments.
    pub(crate) fn result(self, arguments: &[Type]) -> Option<Type> {
        let number = |given: &Type| matches!(given, Type::Number | Type::Body);
        let text = |given: &Type| matches!(given, Type::Text | Type::Body);
        let (accepted, result) = match self {
            Function::Abs | Function::Ceiling | Function::Floor | Function::Exp => {
                (one(arguments, number), Type::Number)
            }
            Function::Sign | Function::Sqrt | Function::Square => (one(arguments, number), Type::Number),
            Function::Power => (arguments.len() == 2 && arguments.iter().all(number), Type::Number),
            Function::AsNumber => (one(arguments, |given| number(given) || text(given)), Type::Number),
            Function::IsBool
            | Function::IsDefined
            | Function::IsNull
            | Function::IsNumber
            | Function::IsString => (arguments.len() == 1, Type::Bool),
            Function::Concat => (arguments.len() >= 2 && arguments.iter().all(text), Type::Text),
            Function::Length => (one(arguments, text), Type::Number),
            Function::Lower | Function::Upper => (one(arguments, text), Type::Text),
            Function::Substring => match arguments {
                [of, rest @ ..] => {
                    (text(of) && matches!(rest.len(), 1 | 2) && rest.iter().all(number), Type::Text)
                }
                [] => (false, Type::Text),
            },
            Function::IndexOf => (arguments.len() == 2 && arguments.iter().all(text), Type::Number),
            Function::StartsWith | Function::EndsWith | Function::Contains => {
                (arguments.len() == 2 && arguments.iter().all(text), Type::Bool)
            }
        };
        accepted.then_some(result)
    }

    /// What the arguments have to be, in words.
    pub(crate) fn usage(self) -> &'static str {
        match self {
            Function::Abs => "abs(number)",
            Function::Ceiling => "ceiling(number)",
            Function::Floor => "floor(number)",
            Function::Exp => "exp(number)",
            Function::Power => "power(number, number)",
            Function::Sign => "sign(number)",
            Function::Sqrt => "sqrt(number)",
            Function::Square => "square(number)",
            Function::AsNumber => "as_number(number or text)",
            Function::IsBool => "is_bool(value)",
            Function::IsDefined => "is_defined(value)",
            Function::IsNull => "is_null(value)",
            Function::IsNumber => "is_number(value)",
            Function::IsString => "is_string(value)",
            Function::Concat => "concat(text, text, more texts)",
            Function::Length => "length(text)",
            Function::Lower => "lower(text)",
            Function::Upper => "upper(text)",
            Function::Substring => "substring(text, start) or substring(text, start, length)",
            Function::IndexOf => "index_of(text, part)",
            Function::StartsWith => "starts_with(text, part)",
            Function::EndsWith => "ends_with(text, part)",
            Function::Contains => "contains(text, part)",
        }
    }
}

fn one(arguments: &[Type], accepts: impl Fn(&Type) -> bool) -> bool {
    matches!(arguments, [only] if accepts(only))
}
