/* Tables; table.h describes them. */
#include "table.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common.h"
#include "json_output.h"
#include "plain_text.h"

enum { CELL_MAX = 96 };

void table_begin(struct table *table, const char *name, const char *title, const struct table_column *columns,
                 size_t n_columns)
{
    *table = (struct table){.name = name, .title = title, .columns = columns, .n_columns = n_columns};
}

static void add_cell(struct table *table, struct table_cell cell)
{
    if (table->n_cells == table->capacity) {
        table->capacity = table->capacity ? 2 * table->capacity : 256;
        table->cells = realloc(table->cells, table->capacity * sizeof *table->cells);
        if (!table->cells) die("out of memory");
    }
    table->cells[table->n_cells++] = cell;
}

void table_text(struct table *table, const char *text)
{
    struct table_cell cell = {.text = malloc(strlen(text) + 1)};
    if (!cell.text) die("out of memory");
    strcpy(cell.text, text);
    sqz_plain_text(cell.text);
    add_cell(table, cell);
}

void table_number(struct table *table, double number)
{
    add_cell(table, (struct table_cell){.number = number});
}

void table_free(struct table *table)
{
    for (size_t i = 0; i < table->n_cells; i++) free(table->cells[i].text);
    free(table->cells);
    table->cells = NULL;
    table->n_cells = table->capacity = 0;
}

/* ---- Text -------------------------------------------------------------------------- */

static bool is_text(const struct table_column *column)
{
    return column->scale == 0.0;
}

/* A number with so many significant digits and no exponent where 15 characters hold it. */
static void write_number(char text[CELL_MAX], double number, int digits)
{
    const double size = fabs(number);
    if (!isfinite(number)) {
        snprintf(text, CELL_MAX, "-");
    } else if (digits >= 6 && size < 1e15 && number == floor(number)) {
        snprintf(text, CELL_MAX, "%.0f", number); /* a count */
    } else if (size != 0.0 && (size >= 1e12 || size < 1e-4)) {
        snprintf(text, CELL_MAX, "%.*e", digits - 1, number);
    } else {
        const int whole = size >= 1.0 ? (int)floor(log10(size)) + 1 : 0;
        const int fraction = whole >= digits ? 0 : digits - (whole > 0 ? whole : 1);
        snprintf(text, CELL_MAX, "%.*f", fraction, number);
    }
}

static void write_cell(char text[CELL_MAX], const struct table_column *column, const struct table_cell *cell)
{
    if (cell->text) snprintf(text, CELL_MAX, "%s", cell->text);
    else write_number(text, cell->number * (is_text(column) ? 1.0 : column->scale), column->digits);
}

static int column_width(const struct table *table, size_t column)
{
    size_t width = table->columns[column].heading ? strlen(table->columns[column].heading) : 0;
    for (size_t i = column; i < table->n_cells; i += table->n_columns) {
        char text[CELL_MAX];
        write_cell(text, &table->columns[column], &table->cells[i]);
        width = strlen(text) > width ? strlen(text) : width;
    }
    return (int)width;
}

static bool is_last_shown(const struct table *table, size_t column)
{
    while (++column < table->n_columns)
        if (table->columns[column].heading) return false;
    return true;
}

/* A column of texts at the end is not padded: no line ends in blanks. */
static void print_cell(const struct table *table, size_t column, int width, const char *text)
{
    const bool last = is_last_shown(table, column);
    if (!table->columns[column].heading) return;
    if (!is_text(&table->columns[column])) printf("%*s", width, text);
    else printf("%-*s", last ? 0 : width, text);
    printf("%s", last ? "\n" : "  ");
}

void table_print(const struct table *table)
{
    int widths[TABLE_COLUMNS_MAX];
    if (table->title) printf("%s\n", table->title);
    for (size_t c = 0; c < table->n_columns; c++) {
        widths[c] = column_width(table, c);
        print_cell(table, c, widths[c], table->columns[c].heading ? table->columns[c].heading : "");
    }
    for (size_t i = 0; i < table->n_cells; i++) {
        const size_t c = i % table->n_columns;
        char text[CELL_MAX];
        write_cell(text, &table->columns[c], &table->cells[i]);
        print_cell(table, c, widths[c], text);
    }
}

/* ---- CSV and JSON ---------------------------------------------------------------------- */

static void print_csv_text(const char *text)
{
    if (!strpbrk(text, ",\"\r\n")) {
        printf("%s", text);
        return;
    }
    putchar('"');
    for (; *text; text++) printf(*text == '"' ? "\"%c" : "%c", *text);
    putchar('"');
}

void table_print_csv(const struct table *table)
{
    for (size_t c = 0; c < table->n_columns; c++)
        printf("%s%s", table->columns[c].key, c + 1 == table->n_columns ? "\r\n" : ",");
    for (size_t i = 0; i < table->n_cells; i++) {
        const struct table_cell *cell = &table->cells[i];
        if (cell->text) print_csv_text(cell->text);
        else if (isfinite(cell->number)) printf("%.10g", cell->number);
        printf("%s", (i + 1) % table->n_columns == 0 ? "\r\n" : ",");
    }
}

json_t *table_json(const struct table *table)
{
    json_t *rows = json_array(), *row = NULL;
    for (size_t i = 0; i < table->n_cells; i++) {
        const struct table_cell *cell = &table->cells[i];
        const size_t c = i % table->n_columns;
        if (c == 0) {
            row = json_object();
            json_array_append_new(rows, row);
        }
        json_object_set_new(row, table->columns[c].key, cell->text ? json_text(cell->text) : json_number(cell->number));
    }
    return rows;
}
