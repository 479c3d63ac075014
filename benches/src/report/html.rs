//! The report as one page: what it shows is all inside, and it asks no network for anything.

use std::fmt::Write as _;

use super::plot::PlotError;
use super::{Report, Section};
use crate::figure::Row;
use crate::machine::Machine;

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:84rem;padding:0 1rem;color:#222;background:#fff}\
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}\
th,td{border-bottom:1px solid #ddd;padding:.25rem .75rem;text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left;white-space:pre}\
thead th{border-bottom:2px solid #888;white-space:normal;vertical-align:bottom}\
tr.headline td{font-weight:600}\
.plots{display:flex;flex-wrap:wrap;gap:1rem}\
.plots svg{max-width:100%;height:auto}\
.note{background:#f2f2f2;padding:.4rem .8rem}\
.warning{background:#fff4d6;border-left:4px solid #d55e00;padding:.4rem .8rem}";

/// The whole page.
pub(super) fn page(report: &Report) -> Result<String, PlotError> {
    let mut page = Page(String::from(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>ferry bench</title>\n",
    ));
    page.markup(&format!(
        "<style>{STYLE}</style>\n</head>\n<body>\n<h1>ferry bench</h1>\n"
    ));
    page.machine(&report.machine);
    page.notes(&report.notes);
    page.overview(&report.sections);
    for section in &report.sections {
        page.section(section)?;
    }
    page.markup("</body>\n</html>\n");
    Ok(page.0)
}

/// A page that is being written. Whatever comes from outside goes through [`Page::text`].
struct Page(String);

impl Page {
    fn markup(&mut self, markup: &str) {
        self.0.push_str(markup);
    }

    /// Text, in which nothing is markup.
    fn text(&mut self, text: &str) {
        for letter in text.chars() {
            match letter {
                '&' => self.markup("&amp;"),
                '<' => self.markup("&lt;"),
                '>' => self.markup("&gt;"),
                '"' => self.markup("&quot;"),
                '\'' => self.markup("&#39;"),
                letter => self.0.push(letter),
            }
        }
    }

    /// An element with nothing but text in it; its name is ours.
    fn element(&mut self, name: &str, text: &str) {
        self.markup(&format!("<{name}>"));
        self.text(text);
        self.markup(&format!("</{name}>"));
    }

    fn row(&mut self, cell: &str, cells: impl IntoIterator<Item = impl AsRef<str>>) {
        for text in cells {
            self.element(cell, text.as_ref());
        }
        self.markup("</tr>\n");
    }

    fn head(&mut self, cells: impl IntoIterator<Item = impl AsRef<str>>) {
        self.markup("<table>\n<thead>\n<tr>");
        self.row("th", cells);
        self.markup("</thead>\n<tbody>\n");
    }

    fn end_of_table(&mut self) {
        self.markup("</tbody>\n</table>\n");
    }

    fn notes(&mut self, notes: &[String]) {
        for note in notes {
            self.markup(match note.starts_with("WARNING") {
                true => "<p class=\"warning\">",
                false => "<p class=\"note\">",
            });
            self.text(note);
            self.markup("</p>\n");
        }
    }

    fn machine(&mut self, machine: &Machine) {
        let Machine {
            processor,
            cpus,
            memory,
            kernel,
            huge_pages,
            vmms,
            load: [before, after],
        } = machine;
        let mut told = format!(
            "{cpus} CPUs ({processor}), {:.1} GiB, Linux {kernel}, transparent huge pages: \
             {huge_pages}; load average {before} before, {after} after.",
            *memory as f64 / f64::from(1 << 30)
        );
        for (name, version) in vmms {
            // A String takes whatever is written to it.
            let _ = write!(told, " {name}: {version}.");
        }
        self.element("p", &told);
        self.element(
            "p",
            "Figures are medians, with the least and the greatest behind them; ratios are of runs \
             made right after each other, less than 1 where the first has less. Of the guest's work \
             more is better, of all other headlines less.",
        );
    }

    /// The headline ratios of all sections that have any.
    fn overview(&mut self, sections: &[Section]) {
        let compared = sections.iter().filter(|section| {
            section.compared().next().is_some() && section.rows.iter().any(|row| row.headline)
        });
        let mut names: Vec<String> = Vec::new();
        for row in compared.clone().flat_map(|section| &section.rows) {
            if row.headline && !names.contains(&row.name) {
                names.push(row.name.clone());
            }
        }
        if names.is_empty() {
            return;
        }
        self.element("h2", "Ratios");
        let columns = ["".to_owned(), "of".to_owned()];
        self.head(columns.iter().chain(&names));
        for section in compared {
            let first = section.vmms.first().map(String::as_str).unwrap_or_default();
            for (vmm, other) in section.compared() {
                let ratio = |name: &String| {
                    let row = section.rows.iter().find(|row| row.name == *name)?;
                    row.ratio(vmm).map(|ratio| ratio.to_string())
                };
                let mut cells = vec![section.title.clone(), format!("{first}/{other}")];
                cells.extend(names.iter().map(|name| ratio(name).unwrap_or_default()));
                self.markup("<tr>");
                self.row("td", cells);
            }
        }
        self.end_of_table();
    }

    fn section(&mut self, section: &Section) -> Result<(), PlotError> {
        self.element("h2", &section.title);
        self.element("p", &section.description);
        self.notes(&section.notes);
        self.head(std::iter::once(String::new()).chain(section.head()));
        for row in &section.rows {
            self.markup(if row.headline {
                "<tr class=\"headline\">"
            } else {
                "<tr>"
            });
            self.row("td", std::iter::once(row.label()).chain(section.cells(row)));
        }
        self.end_of_table();
        self.markup("<div class=\"plots\">\n");
        for plot in section.plots.iter().filter(|plot| !plot.is_empty()) {
            self.markup(&plot.svg()?);
        }
        self.markup("</div>\n");
        self.every_run(section);
        Ok(())
    }

    fn every_run(&mut self, section: &Section) {
        self.markup("<details>\n<summary>Every run</summary>\n");
        for (vmm, name) in section.vmms.iter().enumerate() {
            let runs = |row: &Row| row.values.get(vmm).map_or(0, Vec::len);
            let most = section.rows.iter().map(runs).max().unwrap_or(0);
            let numbers = (1..=most).map(|number| number.to_string());
            self.head(std::iter::once(name.clone()).chain(numbers));
            for row in &section.rows {
                let digits = row.digits;
                let values = row.values.get(vmm).into_iter().flatten();
                let cells =
                    values.map(|value| value.map_or_else(String::new, |v| format!("{v:.digits$}")));
                self.markup("<tr>");
                self.row("td", std::iter::once(row.label()).chain(cells));
            }
            self.end_of_table();
        }
        self.markup("</details>\n");
    }
}

#[cfg(test)]
mod tests {
    use super::super::plot::{Plot, Series, Style};
    use super::*;
    use crate::figure::Unit;

    fn report() -> Report {
        Report {
            machine: Machine {
                processor: "EPYC <b>".to_owned(),
                ..Machine::default()
            },
            notes: vec![
                "a <script>note</script>".to_owned(),
                "WARNING: b".to_owned(),
            ],
            sections: vec![Section {
                title: "idle \"&\"".to_owned(),
                description: "guest".to_owned(),
                notes: vec![],
                vmms: vec!["ferry".to_owned(), "qemu".to_owned()],
                in_turn: true,
                rows: vec![Row {
                    name: "total".to_owned(),
                    unit: Unit::Milliseconds,
                    digits: 1,
                    headline: true,
                    values: vec![
                        vec![Some(100.0), Some(321.5), None],
                        vec![Some(200.0), Some(643.0), Some(777.7)],
                    ],
                }],
                plots: vec![Plot {
                    title: "by round".to_owned(),
                    x: "round".to_owned(),
                    whole_x: true,
                    y: "MiB".to_owned(),
                    log_from: None,
                    series: vec![Series {
                        name: "sent".to_owned(),
                        style: Style::Line,
                        lines: vec![vec![(1.0, 2.0), (2.0, 1.0)]],
                    }],
                }],
                input: serde_json::Value::Null,
                runs: serde_json::Value::Null,
            }],
        }
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = page(&report()).unwrap();
        for outside in [
            "src=", "href", "url(", "@import", "<link", "<script", "<iframe", "<img",
        ] {
            assert!(!page.contains(outside), "{outside}");
        }
        // The name of a namespace is no address that is asked.
        let names = page.matches("xmlns=\"http://www.w3.org/2000/svg\"").count();
        assert_eq!(names, 1);
        assert_eq!(page.matches("://").count(), names);
    }

    #[test]
    fn the_page_holds_the_figures() {
        let page = page(&report()).unwrap();
        for figure in [
            "total, ms",
            "210.8 (100.0–321.5)",
            "643.0 (200.0–777.7)",
            "0.50 (0.50–0.50)",
            "777.7",
        ] {
            assert!(page.contains(figure), "{figure}");
        }
        assert_eq!(page.matches("<svg").count(), 1);
        // Two points, and the legend's.
        assert_eq!(page.matches("<circle").count(), 3);
    }

    #[test]
    fn what_comes_from_outside_is_no_markup() {
        let page = page(&report()).unwrap();
        assert!(page.contains("EPYC &lt;b&gt;"));
        assert!(page.contains("a &lt;script&gt;note&lt;/script&gt;"));
        assert!(page.contains("idle &quot;&amp;&quot;"));
        assert!(page.contains("<p class=\"warning\">WARNING: b</p>"));
    }

    #[test]
    fn every_element_that_is_opened_is_closed() {
        let page = page(&report()).unwrap();
        for name in [
            "table", "thead", "tbody", "tr", "td", "th", "div", "p", "svg", "details",
        ] {
            let opened = page.matches(&format!("<{name}>")).count()
                + page.matches(&format!("<{name} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{name}>")).count(),
                "{name}"
            );
        }
    }
}
