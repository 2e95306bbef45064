//! What the program writes: tables and JSON to standard output; questions, progress and errors to standard error.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::usage;

pub(crate) struct Console {
    pub(crate) is_json: bool,
    is_agreed: bool,
    bar: ProgressBar,
}

impl Console {
    pub(crate) fn new(is_json: bool, is_agreed: bool) -> Self {
        Self {
            is_json,
            is_agreed,
            bar: ProgressBar::hidden(),
        }
    }

    /// To standard output; in colours only if that is a terminal.
    pub(crate) fn print(&self, text: &str) -> anyhow::Result<()> {
        self.bar.suspend(|| {
            let mut out = anstream::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()
        })?;
        Ok(())
    }

    /// One document.
    pub(crate) fn print_json(&self, document: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(document)?;
        text.push('\n');
        self.print(&text)
    }

    /// A list of documents, as one.
    pub(crate) fn print_json_list(
        &self,
        documents: impl IntoIterator<Item = impl Serialize>,
    ) -> anyhow::Result<()> {
        self.print_json(&documents.into_iter().collect::<Vec<_>>())
    }

    /// One document of several, in a line.
    pub(crate) fn print_json_line(&self, document: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(document)?;
        text.push('\n');
        self.print(&text)
    }

    /// To standard error.
    pub(crate) fn say(&self, text: &str) {
        // Nobody reads it if that is closed, which is no reason to stop.
        self.bar.suspend(|| {
            let _ = writeln!(anstream::stderr(), "{text}");
        });
    }

    /// Asks before something is done that cannot be undone. An error if the answer is no, or if there is nobody
    /// to ask.
    pub(crate) async fn ask(&self, what: &str) -> anyhow::Result<()> {
        if self.is_agreed {
            return Ok(());
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(usage(format!(
                "{what}: give --yes, as there is no terminal to ask at (--dry-run only tells)"
            )));
        }
        let _ = write!(anstream::stderr(), "{}. Go on? [y/N] ", safe(what));
        let answer = tokio::task::spawn_blocking(|| {
            let mut answer = String::new();
            io::stdin().read_line(&mut answer).map(|_| answer)
        });
        let answer = answer.await??;
        if matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(());
        }
        anyhow::bail!("nothing was changed")
    }

    /// Shows on a terminal that something is going on; see [`clear`](Self::clear).
    pub(crate) fn begin(&self, what: &'static str) {
        self.bar.set_draw_target(ProgressDrawTarget::stderr());
        self.bar.set_style(
            ProgressStyle::with_template("{spinner} {prefix} {msg}")
                .expect("the template is constant and right"),
        );
        self.bar.set_prefix(what);
        self.bar.enable_steady_tick(Duration::from_millis(100));
    }

    /// A handle that moves the progress.
    pub(crate) fn progress(&self) -> ProgressBar {
        self.bar.clone()
    }

    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Says what went wrong, in a line.
pub(crate) fn complain(error: &anyhow::Error) {
    let style = AnsiColor::Red.on_default().bold();
    let _ = writeln!(
        anstream::stderr(),
        "{style}error:{style:#} {}",
        safe(&told(error))
    );
}

/// An error with its causes, but for those that it has told itself.
fn told(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told.push_str(": ");
            told.push_str(&cause);
        }
    }
    told
}

pub(crate) const DIM: Style = Style::new().dimmed();
pub(crate) const BOLD: Style = Style::new().bold();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const WARN: Style = AnsiColor::Yellow.on_default();
pub(crate) const BAD: Style = AnsiColor::Red.on_default();

/// A text that came from somewhere else, in one line: what would steer a terminal does not get there.
pub(crate) fn safe(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Lines that came from somewhere else, indented.
pub(crate) fn indented(text: &str) -> String {
    let mut indented = String::new();
    for line in text.lines() {
        let _ = writeln!(indented, "  {}", safe(line));
    }
    indented
}

/// The beginning of a text.
pub(crate) fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most.saturating_sub(1)).collect();
    kept + "…"
}

/// Rows of cells, aligned. The last column is as long as it is.
pub(crate) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

/// A cell, and how it looks on a terminal.
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>, style: Style) -> Self {
        Self {
            text: safe(text.as_ref()),
            style,
        }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Style::new())
    }
}

impl Table {
    /// A column whose name begins with `>` is of numbers. Without any names there is no head.
    pub(crate) fn new<const N: usize>(head: [&'static str; N]) -> Self {
        Self {
            head: head.map(str::to_owned).into(),
            rows: Vec::new(),
        }
    }

    /// Columns whose names came from somewhere else.
    pub(crate) fn named(names: &[String]) -> Self {
        Self {
            head: names.iter().map(|name| safe(name)).collect(),
            rows: Vec::new(),
        }
    }

    /// A row that has as many cells as there are columns.
    pub(crate) fn push(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.push(cells.into());
    }

    /// As lines that begin with `indent`.
    pub(crate) fn text(&self, indent: &str) -> String {
        let name = |index: usize| self.head[index].trim_start_matches('>');
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = (0..self.head.len())
            .map(|index| {
                let cells = self.rows.iter().map(|row| width(&row[index].text));
                cells.max().unwrap_or(0).max(width(name(index)))
            })
            .collect();
        let mut text = String::new();
        let mut line = |cells: Vec<(&str, Style)>| {
            text.push_str(indent);
            let last = cells.len() - 1;
            for (index, (cell, style)) in cells.into_iter().enumerate() {
                let pad = " ".repeat(widths[index] - width(cell));
                let is_right = self.head[index].starts_with('>');
                let (before, after) = if is_right { (&*pad, "") } else { ("", &*pad) };
                let after = if index == last { "" } else { after };
                let gap = if index == last { "\n" } else { "  " };
                let style = if cell.is_empty() { Style::new() } else { style };
                let _ = write!(text, "{before}{style}{cell}{style:#}{after}{gap}");
            }
        };
        if (0..self.head.len()).any(|index| !name(index).is_empty()) {
            line((0..self.head.len()).map(|i| (name(i), DIM)).collect());
        }
        for row in &self.rows {
            line(row.iter().map(|cell| (&*cell.text, cell.style)).collect());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_says_nothing_to_the_terminal() {
        let mut table = Table::new(["name", ">waiting", "error"]);
        table.row(["a".into(), "7".into(), "x\u{1b}[2Jy\nz".into()]);
        table.row(["billing".into(), "1000+".into(), "".into()]);
        let text = anstream::adapter::strip_str(&table.text("  ")).to_string();
        assert_eq!(
            text,
            "  name     waiting  error\n  a              7  x [2Jy z\n  billing    1000+  \n"
        );
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::anyhow!("permission denied")
            .context("the server says: permission denied")
            .context("could not look");
        assert_eq!(
            told(&error),
            "could not look: the server says: permission denied"
        );
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("grün", 4), "grün");
        assert_eq!(cut("grünes", 4), "grü…");
    }
}
