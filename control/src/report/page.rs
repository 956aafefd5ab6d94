//! What every report has in common: head, style sheet, a row of figures in large print.

use maud::{DOCTYPE, Markup, PreEscaped, html};

/// A number with its name.
#[derive(Debug, Clone)]
pub struct Tile {
    name: String,
    value: String,
}

impl Tile {
    /// `value` with its unit.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: value.into() }
    }
}

/// A row of tiles.
pub(super) fn tiles(tiles: &[Tile]) -> Markup {
    html! {
        dl.tiles {
            @for tile in tiles {
                div { dt { (tile.name) } dd { (tile.value) } }
            }
        }
    }
}

/// A whole page around `body`.
pub(super) fn shell(title: &str, body: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body { main { (body) } }
        }
    }
    .into_string()
}

/// A chart or a table with its title, and a word on each colour in it.
pub(super) fn figure(title: &str, legend: &[(&str, &str)], contents: &Markup) -> Markup {
    html! {
        figure {
            figcaption {
                h3 { (title) }
                @if !legend.is_empty() {
                    ul.legend { @for (class, text) in legend { li { i class=(class) {} (text) } } }
                }
            }
            (contents)
        }
    }
}
