/* Results as rows of named columns: one description gives the aligned text, the CSV and the JSON. */
#ifndef SQZ_CONSOLE_TABLE_H
#define SQZ_CONSOLE_TABLE_H

#include <jansson.h>
#include <stddef.h>

enum { TABLE_COLUMNS_MAX = 20 };

struct table_column {
    const char *key;     /* in CSV and JSON, with the unit of the raw number: "flops", "seconds" */
    const char *heading; /* in text, with the unit shown: "GFLOP"; NULL: not shown */
    double scale;        /* the number shown is the raw one times this; 0 for columns of texts */
    int digits;          /* significant ones in text */
};

struct table_cell {
    char *text;    /* NULL: a number */
    double number; /* NAN: none */
};

struct table {
    const char *name, *title;
    const struct table_column *columns;
    size_t n_columns;
    struct table_cell *cells; /* [n_cells], row after row */
    size_t n_cells, capacity;
};

/* columns must outlive the table. title may be NULL. */
void table_begin(struct table *table, const char *name, const char *title, const struct table_column *columns,
                 size_t n_columns);
/* The next cell of the row. */
void table_text(struct table *table, const char *text);
void table_number(struct table *table, double number);
void table_free(struct table *table);

void table_print(const struct table *table);
void table_print_csv(const struct table *table); /* raw numbers, RFC 4180 */
json_t *table_json(const struct table *table);   /* an array of objects, raw numbers */

#endif
