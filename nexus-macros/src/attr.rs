//! The arguments of an attribute: an expression in front, if it takes one, and `key = value`
//! options.

use std::ops::RangeInclusive;

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, TokenStreamExt, quote};
use syn::{
    Attribute, Lit, LitInt, LitStr,
    ext::IdentExt,
    parse::{ParseStream, Parser},
};

use crate::{
    diagnostics::{Diagnostics, closest, did_you_mean},
    duration::{self, Backoff},
    misfire::{self, Misfire},
};

/// What an attribute accepts.
pub(crate) struct Accepted {
    /// How the attribute is written: `#[handler]`.
    pub(crate) attribute: &'static str,
    /// Each option and an example of its value, in the order in which they are listed to users.
    pub(crate) options: &'static [(&'static str, &'static str)],
    /// What people write, and what to say to it.
    pub(crate) hints: &'static [(&'static str, &'static str)],
    /// Whether a string comes first, without a key.
    pub(crate) leading_text: bool,
}

/// Names that other libraries have for our options.
const SYNONYMS: [(&str, &str); 20] = [
    ("attempts", "max_attempts"),
    ("retries", "max_attempts"),
    ("max_retries", "max_attempts"),
    ("retry", "backoff"),
    ("delay", "backoff"),
    ("queue", "group"),
    ("deadline", "timeout"),
    ("max_concurrency", "concurrency"),
    ("parallelism", "concurrency"),
    ("timezone", "tz"),
    ("time_zone", "tz"),
    ("event_type", "type"),
    ("topic", "type"),
    ("alias", "formerly"),
    ("aliases", "formerly"),
    ("renamed_from", "formerly"),
    ("previously", "formerly"),
    ("missed", "misfire"),
    ("on_misfire", "misfire"),
    ("grace_period", "grace"),
];

/// The arguments of one attribute, each option at most once and known.
pub(crate) struct Arguments {
    accepted: &'static Accepted,
    /// The string in front.
    pub(crate) leading: Option<LitStr>,
    options: Vec<(Ident, Value)>,
    /// The string in front is missing, but what stands in its place was reported already.
    pub(crate) excused: bool,
}

/// What was written behind the `=`; never empty.
struct Value {
    tokens: Vec<TokenTree>,
}

impl Arguments {
    pub(crate) fn none(accepted: &'static Accepted) -> Self {
        Self {
            accepted,
            leading: None,
            options: Vec::new(),
            excused: false,
        }
    }

    /// Takes the arguments apart, and reports what is not understood, unknown or given twice.
    pub(crate) fn parse(
        tokens: TokenStream,
        accepted: &'static Accepted,
        diagnostics: &mut Diagnostics,
    ) -> Self {
        let mut arguments = Self::none(accepted);
        arguments.extend(tokens, diagnostics);
        arguments
    }

    /// Adds the arguments of a further attribute of the same kind.
    pub(crate) fn extend(&mut self, tokens: TokenStream, diagnostics: &mut Diagnostics) {
        for (index, part) in split_at_commas(tokens).into_iter().enumerate() {
            match &*part {
                [TokenTree::Literal(literal)]
                    if self.accepted.leading_text
                        && self.leading.is_none()
                        && let Ok(text) = syn::parse2(literal.to_token_stream()) =>
                {
                    if index > 0 {
                        diagnostics.error(
                            literal.span(),
                            format!(
                                "the cron expression of `{}` comes first, before the options",
                                self.accepted.attribute
                            ),
                        );
                    }
                    self.leading = Some(text);
                }
                // A constant, a number or a call where the leading string belongs.
                [first, rest @ ..] if self.misses_leading(index, first, rest) => {
                    self.excused = true;
                    diagnostics.error_over(
                        part.iter().cloned().collect::<TokenStream>(),
                        format!(
                            "the cron expression of `{}` is a string literal, so that it can be checked while compiling",
                            self.accepted.attribute
                        ),
                    );
                }
                [TokenTree::Ident(key), rest @ ..] => self.add(key, rest, diagnostics),
                _ => self.report_no_option(&part, diagnostics),
            }
        }
    }

    fn misses_leading(&self, index: usize, first: &TokenTree, rest: &[TokenTree]) -> bool {
        let assigns = matches!(rest, [TokenTree::Punct(mark), ..] if mark.as_char() == '=');
        let is_option = match first {
            TokenTree::Ident(key) => self.is_known(&key.unraw().to_string()),
            _ => false,
        };
        self.accepted.leading_text && index == 0 && !assigns && !is_option
    }

    fn is_known(&self, name: &str) -> bool {
        self.accepted
            .options
            .iter()
            .any(|(known, _)| *known == name)
    }

    fn add(&mut self, key: &Ident, rest: &[TokenTree], diagnostics: &mut Diagnostics) {
        let attribute = self.accepted.attribute;
        let name = key.unraw().to_string();
        let Some((_, example)) = self
            .accepted
            .options
            .iter()
            .find(|(known, _)| *known == name)
        else {
            self.excused |= self.hint(&name).is_some();
            diagnostics.error(key.span(), self.unknown(&name));
            return;
        };
        if self.options.iter().any(|(known, _)| *known == name) {
            diagnostics.error(
                key.span(),
                format!("option `{name}` of `{attribute}` is given twice; remove one of them"),
            );
            return;
        }
        match rest {
            [TokenTree::Punct(equals), value @ ..]
                if equals.as_char() == '=' && !value.is_empty() =>
            {
                self.options.push((
                    key.unraw(),
                    Value {
                        tokens: value.to_vec(),
                    },
                ));
            }
            _ => diagnostics.error(
                key.span(),
                format!(
                    "option `{name}` of `{attribute}` needs a value: write `{name} = {example}`"
                ),
            ),
        }
    }

    fn report_no_option(&self, part: &[TokenTree], diagnostics: &mut Diagnostics) {
        let (option, example) = self.accepted.options[0];
        diagnostics.error_over(
            part.iter().cloned().collect::<TokenStream>(),
            format!(
                "expected an option of `{}`, such as `{option} = {example}`\n{}",
                self.accepted.attribute,
                self.known_options()
            ),
        );
    }

    fn unknown(&self, name: &str) -> String {
        let Accepted {
            attribute, options, ..
        } = self.accepted;
        if let Some(hint) = self.hint(name) {
            return format!("unknown option `{name}` for `{attribute}`; {hint}");
        }
        let known = || options.iter().map(|&(option, _)| option);
        let synonym = SYNONYMS
            .iter()
            .find(|(word, _)| *word == name)
            .map(|&(_, option)| option);
        let meant = synonym
            .filter(|synonym| known().any(|option| option == *synonym))
            .or_else(|| closest(name, known()));
        format!(
            "unknown option `{name}` for `{attribute}`{}\n{}",
            did_you_mean(meant),
            self.known_options()
        )
    }

    fn hint(&self, name: &str) -> Option<&'static str> {
        self.accepted
            .hints
            .iter()
            .find(|(word, _)| *word == name)
            .map(|&(_, hint)| hint)
    }

    fn known_options(&self) -> String {
        let known: Vec<_> = self
            .accepted
            .options
            .iter()
            .map(|(option, _)| format!("`{option}`"))
            .collect();
        format!("known options: {}", known.join(", "))
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let index = self.options.iter().position(|(key, _)| key == name)?;
        Some(self.options.swap_remove(index).1)
    }

    /// A string literal.
    pub(crate) fn text(&mut self, name: &str, diagnostics: &mut Diagnostics) -> Option<LitStr> {
        let value = self.take(name)?;
        if let Some(Lit::Str(text)) = value.literal() {
            return Some(text);
        }
        let example = match &*value.tokens {
            [TokenTree::Ident(word)] => format!("\"{word}\""),
            _ => self.example(name).to_owned(),
        };
        diagnostics.error_over(
            &value,
            format!("option `{name}` is a string: write `{name} = {example}`"),
        );
        None
    }

    /// One string literal, or several in brackets; none, if one of them is not a string.
    pub(crate) fn texts(&mut self, name: &str, diagnostics: &mut Diagnostics) -> Vec<LitStr> {
        let Some(value) = self.take(name) else {
            return Vec::new();
        };
        let parts = match &*value.tokens {
            [TokenTree::Group(list)] if list.delimiter() == Delimiter::Bracket => {
                split_at_commas(list.stream())
            }
            _ => vec![value.tokens.clone()],
        };
        if parts.is_empty() {
            diagnostics.error_over(
                &value,
                format!(
                    "option `{name}` names nothing: write `{name} = {}`, or leave it out",
                    self.example(name)
                ),
            );
        }
        let mut texts = Vec::new();
        for tokens in parts {
            let part = Value { tokens };
            if let Some(Lit::Str(text)) = part.literal() {
                texts.push(text);
                continue;
            }
            let example = match &*part.tokens {
                [TokenTree::Ident(word)] => format!("\"{word}\""),
                _ => self.example(name).to_owned(),
            };
            diagnostics.error_over(
                &part,
                format!(
                    "option `{name}` is a string, or several in brackets: write `{name} = {example}`"
                ),
            );
        }
        texts
    }

    /// `true` or `false`.
    pub(crate) fn switch(&mut self, name: &str, diagnostics: &mut Diagnostics) -> Option<bool> {
        let value = self.take(name)?;
        if let Ok(switch) = syn::parse2::<syn::LitBool>(value.to_token_stream()) {
            return Some(switch.value);
        }
        diagnostics.error_over(
            &value,
            format!(
                "option `{name}` is `true` or `false`: write `{name} = {}`",
                self.example(name)
            ),
        );
        None
    }

    /// A whole number from `range`.
    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<u32>,
        diagnostics: &mut Diagnostics,
    ) -> Option<u32> {
        let value = self.take(name)?;
        let written = value.to_token_stream().to_string().replace(' ', "");
        if let Some(Lit::Str(text)) = value.literal() {
            let text = text.value();
            let digits = if text.parse::<u32>().is_ok() {
                &*text
            } else {
                self.example(name)
            };
            diagnostics.error_over(
                &value,
                format!("option `{name}` is a number: write `{name} = {digits}`"),
            );
            return None;
        }
        let digits = written.strip_prefix('-').unwrap_or(&written);
        let is_number =
            syn::parse_str::<LitInt>(digits).is_ok_and(|number| number.suffix().is_empty());
        if !is_number {
            diagnostics.error_over(
                &value,
                format!(
                    "option `{name}` is a number, not `{written}`: write `{name} = {}`",
                    self.example(name)
                ),
            );
            return None;
        }
        let number = match value.literal() {
            Some(Lit::Int(number)) => number.base10_parse::<u32>().ok(),
            _ => None,
        };
        let number = number.filter(|number| range.contains(number));
        if number.is_none() {
            let is_small = written.starts_with('-') || written == "0";
            let bound = if is_small {
                format!("at least {}", range.start())
            } else {
                format!("at most {}", range.end())
            };
            diagnostics.error_over(
                &value,
                format!("option `{name}` must be {bound}, not {written}"),
            );
        }
        number
    }

    /// A duration: `"1m 30s"`, or `30s` without quotes.
    pub(crate) fn duration(
        &mut self,
        name: &str,
        diagnostics: &mut Diagnostics,
    ) -> Option<(Span, std::time::Duration)> {
        let value = self.take(name)?;
        let text = match value.literal() {
            Some(Lit::Str(text)) => text.value(),
            _ => value.to_token_stream().to_string(),
        };
        match duration::parse_duration(&text) {
            Ok(duration) => Some((value.span(), duration)),
            Err(reason) => {
                diagnostics.error_over(&value, format!("invalid `{name}`: {reason}"));
                None
            }
        }
    }

    /// A backoff: `"exponential(1s..10m)"`, also without quotes.
    pub(crate) fn backoff(&mut self, name: &str, diagnostics: &mut Diagnostics) -> Option<Backoff> {
        let value = self.take(name)?;
        let text = match value.literal() {
            Some(Lit::Str(text)) => text.value(),
            _ => value.to_token_stream().to_string(),
        };
        duration::parse_backoff(&text)
            .map_err(|reason| {
                diagnostics.error_over(&value, format!("invalid `{name}`: {reason}"));
            })
            .ok()
    }

    /// What becomes of missed due times: `"fire_all(10)"`, also without quotes.
    pub(crate) fn misfire(&mut self, name: &str, diagnostics: &mut Diagnostics) -> Option<Misfire> {
        let value = self.take(name)?;
        let text = match value.literal() {
            Some(Lit::Str(text)) => text.value(),
            _ => value.to_token_stream().to_string(),
        };
        misfire::parse(&text)
            .map_err(|reason| {
                diagnostics.error_over(&value, format!("invalid `{name}`: {reason}"));
            })
            .ok()
    }

    /// The name of a field, or its number in a tuple struct.
    pub(crate) fn member(
        &mut self,
        name: &str,
        diagnostics: &mut Diagnostics,
    ) -> Option<syn::Member> {
        let value = self.take(name)?;
        if let Ok(member) = syn::parse2(value.to_token_stream()) {
            return Some(member);
        }
        let example = match value.literal() {
            Some(Lit::Str(text)) if syn::parse_str::<Ident>(&text.value()).is_ok() => text.value(),
            _ => self.example(name).to_owned(),
        };
        diagnostics.error_over(
            &value,
            format!(
                "option `{name}` is the name of a field, without quotes: write `{name} = {example}`"
            ),
        );
        None
    }

    fn example(&self, name: &str) -> &'static str {
        self.accepted
            .options
            .iter()
            .find(|(option, _)| *option == name)
            .map_or("…", |(_, example)| example)
    }
}

impl Value {
    fn literal(&self) -> Option<Lit> {
        match &*self.tokens {
            [TokenTree::Literal(literal)] => Some(Lit::new(literal.clone())),
            _ => None,
        }
    }

    fn span(&self) -> Span {
        self.tokens[0].span()
    }
}

impl ToTokens for Value {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        tokens.append_all(&self.tokens);
    }
}

/// Whether the attribute is the macro `name`, by whichever path.
pub(crate) fn is_macro(attribute: &Attribute, name: &str) -> bool {
    let last = attribute.path().segments.last();
    last.is_some_and(|segment| segment.ident == name)
}

/// The attributes in front of an item of which `is_wanted` is true, and the item without them.
pub(crate) fn split_off(
    item: &TokenStream,
    is_wanted: impl Fn(&Attribute) -> bool,
) -> (Vec<Attribute>, TokenStream) {
    let parts = |input: ParseStream<'_>| {
        Ok((
            input.call(Attribute::parse_outer)?,
            input.parse::<TokenStream>()?,
        ))
    };
    // What does not even begin with attributes is reported when the item is read.
    let Ok((attributes, rest)) = parts.parse2(item.clone()) else {
        return (Vec::new(), item.clone());
    };
    let (wanted, others): (Vec<_>, Vec<_>) = attributes.into_iter().partition(is_wanted);
    (wanted, quote!(#(#others)* #rest))
}

/// The parts between the commas; a comma at the end is allowed. Groups without delimiters, in
/// which `macro_rules!` passes its fragments on, are opened.
pub(crate) fn split_at_commas(tokens: TokenStream) -> Vec<Vec<TokenTree>> {
    let mut parts = vec![Vec::new()];
    for token in ungrouped(tokens) {
        match token {
            TokenTree::Punct(comma) if comma.as_char() == ',' => parts.push(Vec::new()),
            token => parts.last_mut().expect("there is a first part").push(token),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn ungrouped(tokens: TokenStream) -> Vec<TokenTree> {
    let is_open = |group: &Group| group.delimiter() == Delimiter::None;
    tokens
        .into_iter()
        .flat_map(|token| match token {
            TokenTree::Group(group) if is_open(&group) => ungrouped(group.stream()),
            token => vec![token],
        })
        .collect()
}
