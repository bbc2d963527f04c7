//! What is drawn, and what keys do.

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Row as Drawn, Table, TableState};

use super::rows::{COLUMNS, Column, Rows, Sort};

/// Fits 80 columns; `--help` has the rest.
const KEYS: &str = "q end  / filter  r reverse  < > sort  n c v m g d t x: by that column";
/// The longest filter that can be typed.
const MAX_FILTER: usize = 100;

/// What a key asks for beyond the view.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    Suspend,
    End,
}

#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) rows: Rows,
    /// Why the figures are old.
    pub(super) trouble: Option<String>,
    /// A filter is being typed; this is the one before.
    typing: Option<String>,
    table: TableState,
    /// Lines of the table that were visible last.
    page: usize,
}

impl View {
    pub(super) fn new(rows: Rows) -> Self {
        Self {
            rows,
            ..Self::default()
        }
    }

    pub(super) fn key(&mut self, key: KeyEvent) -> Told {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Told::End,
                KeyCode::Char('z') => Told::Suspend,
                _ => Told::Nothing,
            };
        }
        if let Some(before) = self.typing.take() {
            self.typed(key.code, before);
            return Told::Nothing;
        }
        match key.code {
            KeyCode::Char('q') => return Told::End,
            KeyCode::Char('/') => self.typing = Some(self.rows.filter.clone()),
            KeyCode::Esc => self.rows.filter.clear(),
            KeyCode::Char('r') => self.rows.reversed = !self.rows.reversed,
            KeyCode::Char('<') | KeyCode::Left => self.rows.sort = self.rows.sort.beside(-1),
            KeyCode::Char('>') | KeyCode::Right => self.rows.sort = self.rows.sort.beside(1),
            KeyCode::Up => self.move_by(-1),
            KeyCode::Down => self.move_by(1),
            KeyCode::PageUp => self.move_by(-self.page.cast_signed()),
            KeyCode::PageDown => self.move_by(self.page.cast_signed()),
            KeyCode::Home => self.table.select_first(),
            KeyCode::End => self.table.select_last(),
            KeyCode::Char(key) => {
                if let Some(sort) = Sort::by_key(key) {
                    self.rows.sort = sort;
                }
            }
            _ => {}
        }
        Told::Nothing
    }

    fn typed(&mut self, key: KeyCode, before: String) {
        match key {
            KeyCode::Enter => return,
            KeyCode::Esc => {
                self.rows.filter = before;
                return;
            }
            KeyCode::Backspace => drop(self.rows.filter.pop()),
            KeyCode::Char(c) if self.rows.filter.chars().count() < MAX_FILTER => {
                self.rows.filter.push(c);
            }
            _ => {}
        }
        self.typing = Some(before);
    }

    fn move_by(&mut self, lines: isize) {
        let at = self.table.selected().unwrap_or(0);
        let last = self.rows.shown().len().saturating_sub(1);
        let to = at.saturating_add_signed(lines).min(last);
        self.table.select(Some(to));
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let lines = [
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(1),
        ];
        let [head, middle, foot] = Layout::vertical(lines).areas(frame.area());
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let turned = Style::new().add_modifier(Modifier::REVERSED);
        frame.render_widget(Line::styled(self.rows.head(), bold), head);
        let columns = columns(middle.width);
        let shown = self.rows.shown();
        // Those that are gone leave nothing selected behind the end.
        if let Some(at) = self.table.selected() {
            self.table
                .select(shown.len().checked_sub(1).map(|last| at.min(last)));
        }
        let rows = shown.iter().map(|row| {
            let cells = columns.iter().map(|column| Cell::new((column.cell)(row)));
            Drawn::new(cells)
        });
        let titles = columns.iter().map(|column| Cell::new(column.title));
        let widths = columns.iter().map(|column| match column.title {
            "NAME" | "IMAGE" => Constraint::Min(column.width),
            _ => Constraint::Length(column.width),
        });
        let table = Table::new(rows, widths)
            .header(Drawn::new(titles).style(turned))
            .row_highlight_style(bold);
        frame.render_stateful_widget(table, middle, &mut self.table);
        self.page = usize::from(middle.height).saturating_sub(1).max(1);
        let words = match (&self.typing, &self.trouble) {
            (Some(_), _) => format!(
                "filter (Enter keeps it, Esc drops it): {}_",
                self.rows.filter
            ),
            (None, Some(trouble)) => trouble.clone(),
            (None, None) => KEYS.to_owned(),
        };
        frame.render_widget(Line::raw(words), foot);
    }
}

/// Those for which there is room.
fn columns(width: u16) -> Vec<&'static Column> {
    let mut columns: Vec<_> = COLUMNS.iter().collect();
    while columns.len() > 1 {
        let needed: u16 = columns.iter().map(|column| column.width + 1).sum();
        if needed <= width.saturating_add(1) {
            break;
        }
        let spare = columns.iter().map(|column| column.spare).max();
        let at = columns.iter().rposition(|c| Some(c.spare) == spare);
        columns.remove(at.unwrap_or(0));
    }
    columns
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::rows::tests::row;
    use super::*;

    fn view() -> View {
        let mut view = View::default();
        view.rows.set(vec![
            row("web", 1.0, Some(3.0)),
            row("db", 50.0, None),
            row("cache", 7.0, Some(1.0)),
        ]);
        view
    }

    fn drawn(view: &mut View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn press(view: &mut View, code: KeyCode) -> Told {
        view.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    /// Whether these stand in the text in this order.
    fn in_order(text: &str, words: &[&str]) -> bool {
        let mut rest = text;
        words.iter().all(|word| {
            let at = rest.find(word);
            rest = at.map_or("", |at| &rest[at..]);
            at.is_some()
        })
    }

    #[test]
    fn keys_sort_filter_and_end() {
        let mut view = view();
        let text = drawn(&mut view, 130, 10);
        assert!(
            in_order(
                &text,
                &["3 VMs", "by cpu", "NAME", "IMAGE", "db ", "cache ", "web "]
            ),
            "{text}"
        );
        press(&mut view, KeyCode::Char('x'));
        assert!(in_order(
            &drawn(&mut view, 130, 10),
            &["by exits", "web ", "cache ", "db "]
        ));
        press(&mut view, KeyCode::Char('>'));
        press(&mut view, KeyCode::Char('r'));
        assert!(in_order(
            &drawn(&mut view, 130, 10),
            &["by name, reversed", "web ", "db ", "cache "]
        ));
        for c in "/cq".chars() {
            assert_eq!(press(&mut view, KeyCode::Char(c)), Told::Nothing);
        }
        press(&mut view, KeyCode::Backspace);
        let text = drawn(&mut view, 130, 10);
        assert!(
            text.contains("1 VMs of 3 by 'c'")
                && text.contains("Enter keeps it")
                && !text.contains("web "),
            "{text}"
        );
        press(&mut view, KeyCode::Enter);
        assert!(!drawn(&mut view, 130, 10).contains("web "));
        press(&mut view, KeyCode::Esc);
        assert!(drawn(&mut view, 130, 10).contains("web "));
        assert_eq!(press(&mut view, KeyCode::Char('q')), Told::End);
        let control = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL);
        press(&mut view, KeyCode::Char('/'));
        assert_eq!(view.key(control('c')), Told::End);
        assert_eq!(view.key(control('z')), Told::Suspend);
    }

    #[test]
    fn every_size_of_a_terminal_is_drawn() {
        let mut view = view();
        for (width, height) in [(1, 1), (3, 2), (10, 3), (40, 5), (80, 24), (300, 100)] {
            drawn(&mut view, width, height);
            press(&mut view, KeyCode::End);
            press(&mut view, KeyCode::PageDown);
            press(&mut view, KeyCode::Up);
        }
        let text = drawn(&mut view, 80, 24);
        assert!(
            text.contains("GUEST MEM") && text.contains("EXITS/s") && !text.contains("IMAGE"),
            "{text}"
        );
        // The selected one is seen where there is one line.
        view.rows.set(
            (0..50)
                .map(|n| row(&format!("vm-{n:02}"), 0.0, None))
                .collect(),
        );
        press(&mut view, KeyCode::End);
        drawn(&mut view, 80, 6);
        press(&mut view, KeyCode::Home);
        press(&mut view, KeyCode::PageDown);
        assert!(drawn(&mut view, 80, 6).contains("vm-03"));
        view.rows.set(Vec::new());
        drawn(&mut view, 80, 6);
    }
}
