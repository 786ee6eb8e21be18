// What samples/csharp stacks for rows of adapters: standard input has the inputs (name type dims…), a line each; the arguments are the
// folder and the rows. A line of name, dims and base64 comes out for each input that a row brings.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;

public static class Stack
{
    public static int Main(string[] arguments)
    {
        var inputs = new Dictionary<string, Declared>();
        for (string line; (line = Console.ReadLine()) != null;)
        {
            var parts = line.Split(' ');
            inputs[parts[0]] = new Declared { Type = int.Parse(parts[1]), Dims = parts.Skip(2).Select(long.Parse).ToArray() };
        }
        try
        {
            var none = new Dictionary<string, AdapterTensor>();
            var rows = arguments[1].Split(',').Select(name =>
            {
                if (name == "-") return none;
                var file = Path.Combine(arguments[0], "adapters", name + ".onnx_adapter");
                var adapter = AdapterFile.Read(file);
                Rows.RequireFit(adapter, inputs, file);
                return adapter;
            }).ToList();
            foreach (var input in inputs.Where(input => rows.Any(row => row.ContainsKey(input.Key))))
            {
                var stacked = Rows.Stacked(input.Key, input.Value, rows);
                Console.WriteLine(input.Key + " " + string.Join(",", stacked.Dims) + " " + Convert.ToBase64String(stacked.Data));
            }
            return 0;
        }
        catch (RefusedException error)
        {
            Console.Error.WriteLine("refused: " + error.Message);
            return 3;
        }
    }
}
